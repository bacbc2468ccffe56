"""What `inspect` says of a checkpoint's weights, against the tensors themselves."""

import re

import torch

from nemotron_v3.checkpoint import from_pretrained, open_checkpoint
from nemotron_v3.checkpoint.plan import tensors_of
from nemotron_v3.cli.inspect import Inspect
from nemotron_v3.cli.inspect_weights import memory_bytes, part_of, stored_bytes
from nemotron_v3.layers.narrow import NarrowWeight
from tests.checkpoint.files import released_tensors, write_checkpoint
from tests.checkpoint.narrow_files import CONFIG, narrow_tensors
from tests.checkpoint.test_narrow import QUANTISED, write
from tests.model.test_puzzle import puzzle


def test_the_bits_of_each_part_and_the_memory_of_each_choice(tmp_path, capsys, monkeypatch):
    monkeypatch.setenv("COLUMNS", "200")
    tensors, _ = narrow_tensors()
    write(tmp_path, tensors, QUANTISED)
    Inspect(str(tmp_path)).run()
    text = capsys.readouterr().out
    head = tensors["lm_head.weight"], tensors["lm_head.weight_scale"]
    bits = 8 * (sum(t.nbytes for t in head) + 4) / (64 * 128)
    assert re.search(rf"head +nvfp4 in groups of 16: 1 +{bits:.2f} ", text)
    assert re.search(r"routed experts +nvfp4 in groups of 16: 6 ", text)
    assert re.search(r"mamba projections +fp8 with one scale: 2 +8\.\d\d ", text)
    assert re.search(r"attention +bfloat16: 4 +16\.00 ", text)
    assert re.search(r"scales of activations and cache +without effect: 12", text)
    assert "held as stored (narrow=True)" in text and "fits" in text


def test_the_memory_is_that_of_the_loaded_models(tmp_path):
    write(tmp_path, narrow_tensors()[0])
    checkpoint = open_checkpoint(tmp_path)
    for dtype in (torch.bfloat16, torch.float32):
        wide, held = memory_bytes(checkpoint, dtype)
        model = from_pretrained(tmp_path, dtype=dtype)
        assert wide == sum(tensor.nbytes for tensor in tensors_of(model).values())
        tensors = tensors_of(from_pretrained(tmp_path, dtype=dtype, narrow=True))
        own = sum(
            t.nbytes_held if isinstance(t, NarrowWeight) else t.nbytes for t in tensors.values()
        )
        experts = [t for n, t in tensors.items() if ".experts." in n]
        assert held == own + sum(t.numel() for t in experts) * dtype.itemsize


def test_every_weight_belongs_to_a_part_once():
    names = released_tensors(CONFIG.replace(num_nextn_predict_layers=1))
    assert part_of("mtp.layers.0.mixer.experts.0.up_proj.weight") == "multi-token prediction"
    assert part_of("backbone.layers.3.mixer.up_proj.weight") == "MLPs"
    assert part_of("backbone.layers.1.mixer.gate.e_score_correction_bias") == "routers"
    assert part_of("backbone.norm_f.weight").startswith("norms")
    assert len({part_of(name) for name in names}) == 10


def test_a_wide_checkpoint_has_one_choice(tmp_path, capsys, monkeypatch):
    monkeypatch.setenv("COLUMNS", "200")
    tensors = released_tensors(CONFIG)
    write_checkpoint(tmp_path, tensors, CONFIG)
    Inspect(str(tmp_path), dtype="float32").run()
    text = capsys.readouterr().out
    assert "loaded in float32" in text and "held as stored" not in text
    checkpoint = open_checkpoint(tmp_path)
    total = sum(stored_bytes(checkpoint, name) for name in checkpoint)
    assert total == sum(tensor.nbytes for tensor in tensors.values())


def test_blocks_of_several_sizes_have_a_row_each(tmp_path, capsys, monkeypatch):
    monkeypatch.setenv("COLUMNS", "200")
    config = puzzle(1, "EM-E*-E")
    config.to_json(tmp_path / "config.json")
    Inspect(str(tmp_path)).run()
    text = capsys.readouterr().out
    for layer in (0, 3, 6):
        one = config.of_block(layer)
        told = f"{one.num_experts_per_tok} of {one.n_routed_experts} experts"
        assert re.search(rf"moe {layer} +{told}", text)
        assert re.search(rf"moe {layer} +1 ", text)
