"""Models whose weights stay in 8 and 4 bits: equal to the ones loaded wide, in less memory."""

import copy
import json
import weakref

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from nemotron_v3.checkpoint import CheckpointError, audit, from_pretrained, save_pretrained
from nemotron_v3.checkpoint.plan import tensors_of
from nemotron_v3.layers import narrow
from nemotron_v3.layers.narrow import NarrowParts, NarrowWeight
from tests.checkpoint.files import bits, contents
from tests.checkpoint.narrow_files import fp8, narrow_tensors, nvfp4
from tests.checkpoint.test_narrow import HF_QUANT_CONFIG, KINDS, QUANTISED, TWIN, write
from tests.models import tokens


def two(directory, kind: str, **options):
    """The model held narrow, and the one loaded wide."""
    tensors, _ = narrow_tensors(**KINDS[kind])
    write(directory, tensors, TWIN if kind == "compressed-tensors" else QUANTISED, shards=3)
    return from_pretrained(directory, narrow=True, **options), from_pretrained(directory, **options)


@pytest.mark.parametrize("kind", KINDS)
def test_a_model_held_narrow_computes_what_the_wide_one_does(tmp_path, kind):
    held, wide = two(tmp_path, kind, dtype=torch.float32)
    ids = tokens(2, 9, vocab=64)
    assert torch.equal(held(input_ids=ids).logits, wide(input_ids=ids).logits)
    told = [model.generate(ids, max_new_tokens=6).sequences for model in (held, wide)]
    assert told[0].tolist() == told[1].tolist()
    narrow_ones = [n for n, t in tensors_of(held).items() if isinstance(t, NarrowWeight)]
    assert len(narrow_ones) == 2 + 2 + 1 + 2 + 1
    assert held.checkpoint_origin.report.casts["nvfp4 -> nvfp4"] == 9
    audit(held, tmp_path)
    loss = held(input_ids=ids, labels=ids).loss
    assert torch.equal(loss, wide(input_ids=ids, labels=ids).loss) or torch.allclose(
        loss, wide(input_ids=ids, labels=ids).loss, rtol=1e-6
    )


@pytest.mark.parametrize("kind", KINDS)
def test_gradients_go_through_the_values(tmp_path, kind):
    held, wide = two(tmp_path, kind, dtype=torch.float32)
    ids = tokens(2, 9, vocab=64)
    for model in (held, wide):
        model(input_ids=ids).logits.square().sum().backward()
    trained = dict(wide.named_parameters())
    compared = 0
    for name, parameter in held.named_parameters():
        if isinstance(parameter, NarrowWeight):
            assert parameter.grad is None and not parameter.requires_grad
        elif parameter.grad is not None:
            compared += 1
            torch.testing.assert_close(parameter.grad, trained[name].grad, rtol=1e-5, atol=1e-5)
    assert compared > 10


def test_a_backward_pass_keeps_codes_and_gives_each_weight_its_values_few_times(
    tmp_path, monkeypatch
):
    held, _ = two(tmp_path, "modelopt", dtype=torch.float32)
    calls = []
    values = narrow._values

    def watched(*told):
        made = values(*told)
        calls.append(weakref.ref(made.untyped_storage()))
        return made

    monkeypatch.setattr(narrow, "_values", watched)
    hidden = held.model(input_ids=tokens(1, 9, vocab=64)).last_hidden_state
    forward = len(calls)
    assert forward == 7  # every narrow weight below the head, once
    assert not any(call() for call in calls)  # none of the values outlived its product
    hidden.sum().backward()
    assert len(calls) - forward <= 2 * forward


def test_adapters_beside_narrow_experts_train(tmp_path):
    held, wide = two(tmp_path, "modelopt", dtype=torch.float32)
    ids = tokens(2, 9, vocab=64)
    gradients = []
    for model in (held, wide):
        torch.manual_seed(0)
        experts = model.model.layers[1].mixer.experts
        low = experts.add_low_rank(2)
        with torch.no_grad():
            for parameter in low.parameters():
                parameter.normal_()
        model(input_ids=ids, labels=ids).loss.backward()
        gradients.append([parameter.grad for parameter in low.parameters()])
    for ours, theirs in zip(*gradients, strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize("kind", KINDS)
def test_what_was_held_narrow_is_saved_byte_for_byte(tmp_path, kind):
    made = tmp_path / "made"
    made.mkdir()
    (made / "hf_quant_config.json").write_text(json.dumps(HF_QUANT_CONFIG))
    held, _ = two(made, kind)
    save_pretrained(held, tmp_path / "saved")
    assert contents(tmp_path / "saved") == contents(made)
    again = from_pretrained(tmp_path / "saved", narrow=True)
    save_pretrained(again, tmp_path / "again", max_shard_size="1GB")
    audit(from_pretrained(tmp_path / "again", narrow=True), made)


@pytest.mark.parametrize(
    "asked", [{"dtype": torch.float16}, {"experts": "fused"}, {"prefix": "model."}]
)
def test_what_is_held_narrow_is_not_saved_as_something_else(tmp_path, asked):
    held, _ = two(tmp_path / "made", "modelopt")
    with pytest.raises(CheckpointError, match=f"{next(iter(asked))}=.*narrow=False"):
        save_pretrained(held, tmp_path / "saved", **asked)
    assert not (tmp_path / "saved").exists()


def test_a_few_layers_are_held_narrow_and_not_saved(tmp_path):
    two(tmp_path / "made", "modelopt")
    held = from_pretrained(tmp_path / "made", narrow=True, layers=2, dtype=torch.float32)
    wide = from_pretrained(tmp_path / "made", layers=2, dtype=torch.float32)
    ids = tokens(1, 5, vocab=64)
    assert torch.equal(held(input_ids=ids).logits, wide(input_ids=ids).logits)
    with pytest.raises(CheckpointError, match="not all weights are those of the checkpoint"):
        save_pretrained(held, tmp_path / "saved")


def test_a_stack_of_several_layouts_is_loaded_wide(tmp_path):
    tensors, _ = narrow_tensors()
    name = "backbone.layers.1.mixer.experts.1.up_proj."
    stored = fp8(128, 128, torch.Generator().manual_seed(9))
    tensors = {n: t for n, t in tensors.items() if not n.startswith(name)}
    tensors |= {name + leaf: tensor for leaf, tensor in stored.tensors.items()}
    held = from_pretrained(write(tmp_path / "made", tensors), narrow=True)
    experts = held.model.layers[1].mixer.experts
    assert type(experts.up_proj) is nn.Parameter and isinstance(experts.down_proj, NarrowWeight)
    audit(held, tmp_path / "made")
    with pytest.raises(CheckpointError, match="not all weights are those"):
        save_pretrained(held, tmp_path / "saved")


def test_its_memory_is_that_of_the_file(tmp_path):
    held, _ = two(tmp_path, "modelopt")
    total = sum(
        t.nbytes_held if isinstance(t, NarrowWeight) else t.nbytes
        for t in tensors_of(held).values()
    )
    stored = sum(path.stat().st_size for path in tmp_path.glob("*.safetensors"))
    assert total < stored


# -------------------------------------------------------------------------------- the weight alone


def weight(dtype=torch.float32, stack: int | None = None) -> NarrowWeight:
    generator = torch.Generator().manual_seed(0)
    stored = [nvfp4(32, 48, generator).tensors for _ in range(stack or 1)]
    parts = [[s[k] for s in stored] for k in ("weight", "weight_scale", "weight_scale_2")]
    join = torch.stack if stack else (lambda held: held[0])
    return NarrowWeight(NarrowParts(*map(join, parts)), False, dtype)


def test_a_narrow_parameter_is_moved_copied_and_looked_at_as_any_other():
    layer = nn.Linear(48, 32)
    layer.weight = nn.Parameter(weight(), requires_grad=False)
    values = weight().values()
    assert isinstance(layer.weight, nn.Parameter) and "weight" in dict(layer.named_parameters())
    assert (layer.weight.shape, layer.weight.dtype) == ((32, 48), torch.float32)
    x = torch.randn(5, 48)
    assert torch.equal(layer(x), F.linear(x, values, layer.bias))
    assert torch.equal(copy.deepcopy(layer)(x), layer(x))
    assert torch.equal(layer.weight + 1, values + 1)
    assert torch.equal(layer.weight.T @ torch.ones(32), values.T @ torch.ones(32))
    layer.to(torch.bfloat16)
    assert isinstance(layer.weight, NarrowWeight) and layer.weight.dtype == torch.bfloat16
    assert torch.equal(layer.weight.values(), weight(torch.bfloat16).values())
    with torch.autocast("cpu", torch.bfloat16):
        assert layer(x).dtype == torch.bfloat16


def test_rows_are_looked_up_without_the_others():
    for stored in (nvfp4(32, 48, torch.Generator()), fp8(256, 128, torch.Generator(), "block"),
                   fp8(32, 48, torch.Generator(), "row")):  # fmt: skip
        t = stored.tensors
        scale = (
            t["weight_scale"].reshape(-1, 1) if t["weight_scale"].dim() < 2 else t["weight_scale"]
        )
        held = NarrowWeight(
            NarrowParts(t["weight"], scale, t.get("weight_scale_2")), False, torch.bfloat16
        )
        ids = torch.tensor([[3, 0], [31, 3]])
        assert torch.equal(F.embedding(ids, held), stored.by_definition(torch.bfloat16)[ids])


@pytest.mark.parametrize("at_once", [1, 100, 2000, 5000])
def test_values_made_in_pieces_are_the_same(monkeypatch, at_once):
    generator = torch.Generator().manual_seed(1)
    stored = [fp8(256, 128, generator, kind) for kind in ("tensor", "row", "block")]
    held = [weight(), weight(stack=3)]
    for s in stored:
        scale = s.tensors["weight_scale"]
        scale = scale.reshape(-1, 1) if scale.dim() < 2 else scale
        held.append(
            NarrowWeight(NarrowParts(s.tensors["weight"], scale, None), False, torch.bfloat16)
        )
    whole = [one.values() for one in held]
    monkeypatch.setattr(narrow, "AT_ONCE", at_once)
    for one, values in zip(held, whole, strict=True):
        assert torch.equal(bits(one.values()), bits(values))


def test_an_expert_of_a_stack_stays_narrow():
    stack = weight(stack=3)
    assert isinstance(stack[1], NarrowWeight)
    assert torch.equal(bits(stack[1].values()), bits(stack.values()[1]))


def test_nothing_writes_into_a_narrow_weight_or_trains_it():
    held = nn.Parameter(weight(), requires_grad=False)
    for write_into in (lambda: held.zero_(), lambda: held.data.add_(1), lambda: held.copy_(held)):
        with torch.no_grad(), pytest.raises(RuntimeError, match="would write into a weight in 8"):
            write_into()
    held.requires_grad_(True)
    with pytest.raises(RuntimeError, match="frozen"):
        F.linear(torch.ones(1, 48), held)
    with pytest.raises(RuntimeError, match="the input is torch.float64"):
        F.linear(torch.ones(1, 48, dtype=torch.float64), held.requires_grad_(False))
