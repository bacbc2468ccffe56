"""An adapter merged into a model in memory, and the proof that a conversion gives of a merge."""

import json
from dataclasses import replace

import pytest
import torch
from safetensors.torch import save_file

from nemotron_v3.checkpoint import (
    CheckpointError,
    convert,
    from_pretrained,
    merge_adapter,
    plan_conversion,
    save_pretrained,
)
from nemotron_v3.checkpoint.convert_pieces import LowRank
from tests.models import tiny_model


def write_adapter(directory, tensors, **settings):
    directory.mkdir()
    save_file(tensors, directory / "adapter_model.safetensors")
    settings = {"peft_type": "LORA", "r": 3, "lora_alpha": 6} | settings
    (directory / "adapter_config.json").write_text(json.dumps(settings))


@pytest.fixture(params=[torch.float32, torch.bfloat16], ids=str)
def pair(request, tmp_path):
    """A checkpoint, and an adapter of a projection, an expert and the whole final norm."""
    model = tiny_model("ME*-").to(request.param)
    save_pretrained(model, tmp_path / "base")
    prefix, tensors = "base_model.model.model", {}
    shapes = {
        "layers.2.mixer.q_proj": model.model.layers[2].mixer.q_proj.weight.shape,
        "layers.1.mixer.experts.3.up_proj": model.model.layers[1].mixer.experts.up_proj.shape[1:],
    }
    for module, (rows, columns) in shapes.items():
        tensors[f"{prefix}.{module}.lora_A.weight"] = torch.randn(3, columns)
        tensors[f"{prefix}.{module}.lora_B.weight"] = torch.randn(rows, 3)
    tensors[f"{prefix}.norm_f.weight"] = torch.randn_like(model.model.norm_f.weight)
    write_adapter(tmp_path / "adapter", tensors, modules_to_save=["norm_f"])
    return tmp_path


def test_a_merge_in_memory_is_the_merge_on_disk(pair):
    model = from_pretrained(pair / "base")
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    adapter = merge_adapter(model, pair / "adapter")
    convert(pair / "base", pair / "merged", adapter=pair / "adapter")
    expected, merged = from_pretrained(pair / "merged").state_dict(), model.state_dict()
    changed = {name for name in merged if not torch.equal(merged[name], before[name])}
    assert changed == set(adapter.tensors) and len(changed) == 3
    assert all(torch.equal(merged[name], expected[name]) for name in merged)


def test_a_merge_that_is_refused_changes_nothing(pair):
    adapter = pair / "broken"
    huge = {
        f"base_model.model.model.layers.2.mixer.{name}_proj.lora_{half}.weight": torch.full(
            shape, value
        )
        for name, rows, value in (("q", 80, 1.0), ("o", 48, 1e38))
        for half, shape in (("A", (3, 48 if name == "q" else 80)), ("B", (rows, 3)))
    }
    write_adapter(adapter, huge)
    model = from_pretrained(pair / "base")
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    with pytest.raises(CheckpointError, match="o_proj.weight: merged, it is not finite"):
        merge_adapter(model, adapter)
    with pytest.raises(CheckpointError, match="has no adapter_config.json"):
        merge_adapter(model, pair / "base")
    assert all(torch.equal(tensor, before[n]) for n, tensor in model.state_dict().items())


def test_a_conversion_measures_what_it_merged(pair):
    proof = plan_conversion(pair / "base", pair / "merged", adapter=pair / "adapter").run()
    before, after = (from_pretrained(pair / name).state_dict() for name in ("base", "merged"))
    assert [m.name.split(".mixer.")[-1] for m in proof] == [
        "experts.3.up_proj.weight", "q_proj.weight", "backbone.norm_f.weight",
    ]  # fmt: skip
    expert, query, norm = proof
    assert (norm.change, norm.error) == (None, 0)
    for measured, name, index in (
        (query, "model.layers.2.mixer.q_proj.weight", ...),
        (expert, "model.layers.1.mixer.experts.up_proj", 3),
    ):
        base, merged = before[name][index].double(), after[name][index].double()
        moved = (merged - base).norm() / base.norm()
        assert measured.change == pytest.approx(moved.item(), rel=1e-2)
        assert 0 < measured.error <= 1
    assert plan_conversion(pair / "base", pair / "plain").run() == []


@pytest.mark.parametrize("wrong", ["scale", "factor"])
def test_a_wrong_sum_is_not_written(pair, monkeypatch, wrong):
    right = LowRank.rows

    def rows(self, weight, start):
        if wrong == "scale":
            return right(replace(self, scale=self.scale * 1.05), weight, start)
        changed = replace(self, A=self.A.to(torch.bfloat16).float())
        return right(changed, weight, start)

    monkeypatch.setattr(LowRank, "rows", rows)
    with pytest.raises(CheckpointError, match="not the sum of base and adapter") as caught:
        convert(pair / "base", pair / "merged", adapter=pair / "adapter")
    assert any("q_proj.weight is" in problem for problem in caught.value.problems)
    assert not (pair / "merged").exists()


def test_magnitudes_are_proven_too(pair):
    weight = from_pretrained(pair / "base").model.layers[0].mixer.in_proj.weight.detach().float()
    stem = "base_model.model.model.layers.0.mixer.in_proj.lora_"
    tensors = {
        f"{stem}A.weight": torch.randn(3, weight.shape[1]) / 10,
        f"{stem}B.weight": torch.randn(weight.shape[0], 3) / 10,
        f"{stem}magnitude_vector": weight.norm(dim=1) * 1.1,
    }
    write_adapter(pair / "dora", tensors, use_dora=True)
    (proof,) = plan_conversion(pair / "base", pair / "merged", adapter=pair / "dora").run()
    assert 0 < proof.error <= 1 and proof.change > 0.05
