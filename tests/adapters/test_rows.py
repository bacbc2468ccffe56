"""Adapters and hooks that ask which row of a batch a token is in."""

import copy

import pytest
import torch

from tests.adapters.tiny import disturb_adapter, transformers_model
from tests.models import tokens

peft = pytest.importorskip("peft")
pytest.importorskip("transformers")

from nemotron_v3 import hf  # noqa: E402
from nemotron_v3.adapters import lora_targets  # noqa: E402

pytestmark = pytest.mark.filterwarnings("ignore")
INVOKED = [7, 8]


def adapted(model, *ranks, **settings):
    """A copy of `model` with an adapter of each rank, named a, b, ..."""
    model = copy.deepcopy(model)
    targets = list(lora_targets(model, ["attention", "mamba", "mlp", "shared"]).modules)
    if not hf.is_accelerated(model):
        model.config.model_type = "any"  # by its name PEFT refuses out_proj
    configs = [
        peft.LoraConfig(r=r, target_modules=targets, task_type="CAUSAL_LM", **settings)
        for r in ranks
    ]
    torch.manual_seed(0)
    wrapped = peft.get_peft_model(model, configs[0], adapter_name="a")
    for name, config in zip("bc", configs[1:], strict=False):
        wrapped.add_adapter(name, config)
    wrapped.requires_grad_(False)
    for name, parameter in wrapped.named_parameters():
        parameter.requires_grad_("lora_" in name)
    disturb_adapter(wrapped)
    return wrapped.eval()


def padded(side):
    ids = tokens(3, 11, vocab=200) + 9
    mask = torch.ones_like(ids)
    mask[1, slice(None, 4) if side == "left" else slice(7, None)] = 0
    return ids, mask


def near(found, expected):
    scale = expected.abs().max()
    return scale > 0.1 and (found - expected).abs().max() < 2e-5 * scale


@pytest.mark.parametrize("padding", ["none", "left", "right"])
def test_each_row_has_its_own_adapter(padding):
    ids, mask = padded(padding)
    given = {} if padding == "none" else {"attention_mask": mask}
    mask = torch.ones_like(ids) if padding == "none" else mask
    wrapped = adapted(hf.accelerate(transformers_model()), 3, 2)
    with torch.no_grad():
        mixed = wrapped(ids, **given, adapter_names=["a", "b", "__base__"]).logits
        for row, name in enumerate(["a", "b"]):
            wrapped.set_adapter(name)
            alone = wrapped(ids, **given).logits[row]
            assert near(mixed[row][mask[row] == 1], alone[mask[row] == 1]), name
        with wrapped.disable_adapter():
            assert near(mixed[2], wrapped(ids, **given).logits[2])
        assert not near(mixed[0], mixed[2])


def test_rows_generate_as_their_adapters_do():
    ids, mask = padded("left")
    wrapped = adapted(hf.accelerate(transformers_model()), 3, 2)
    options = {"max_new_tokens": 4, "do_sample": False, "eos_token_id": None, "pad_token_id": 0}
    options |= {"input_ids": ids, "attention_mask": mask}
    mixed = wrapped.generate(adapter_names=["a", "b", "a"], **options)
    for name, rows in (("a", [0, 2]), ("b", [1])):
        wrapped.set_adapter(name)
        assert torch.equal(wrapped.generate(**options)[rows], mixed[rows])


@pytest.mark.parametrize("padding", ["none", "left", "right"])
def test_activated_lora_is_as_in_plain_transformers(padding):
    ids, mask = padded(padding)
    given = {} if padding == "none" else {"attention_mask": mask}
    mask = torch.ones_like(ids) if padding == "none" else mask
    ids[0, 3:5] = ids[1, 5:7] = torch.tensor(INVOKED)
    model = transformers_model()
    settings = {"alora_invocation_tokens": INVOKED}
    plain = adapted(model, 3, **settings)
    ours = adapted(hf.accelerate(model), 3, **settings)
    with torch.no_grad():
        expected, found = plain(ids, **given).logits, ours(ids, **given).logits
        with ours.disable_adapter():
            base = ours(ids, **given).logits
    real = mask == 1
    assert near(found[real], expected[real])
    assert near(found[2], base[2]) and not near(found[0], base[0])


def test_activated_lora_learns_as_in_plain_transformers():
    ids, _ = padded("none")
    ids[:, 4:6] = torch.tensor(INVOKED)
    model = transformers_model()
    grads = []
    for base in (model, hf.accelerate(copy.deepcopy(model))):
        wrapped = adapted(base, 3, alora_invocation_tokens=INVOKED).train()
        wrapped(ids, labels=ids).loss.backward()
        grads.append({n: p.grad for n, p in wrapped.named_parameters() if p.grad is not None})
    expected, found = grads
    assert expected.keys() == found.keys() and len(found) > 10
    for name, grad in expected.items():
        assert (found[name] - grad).norm() <= 1e-4 * grad.norm(), name


@pytest.mark.parametrize("padding", ["none", "left"])
@pytest.mark.parametrize("with_adapters", [False, True])
def test_hooks_see_the_grid_and_change_nothing(padding, with_adapters):
    ids, mask = padded(padding)
    given = {} if padding == "none" else {"attention_mask": mask}
    model = hf.accelerate(transformers_model())
    wrapped = adapted(model, 3) if with_adapters else model
    with torch.no_grad():
        expected = wrapped(ids, **given).logits
        seen = {}
        for name, module in wrapped.named_modules():
            if name.endswith(("_proj", "shared_experts")):
                module.register_forward_hook(
                    lambda _, inputs, out, name=name: seen.update(
                        {name: (inputs[0].shape[:-1], out.shape[:-1])}
                    )
                )
        assert near(wrapped(ids, **given).logits, expected)
    assert len(seen) > 10
    assert set(seen.values()) == {(ids.shape, ids.shape)}


def test_a_stack_of_experts_by_row_is_pefts_refusal():
    config = peft.LoraConfig(r=2, target_modules=[], target_parameters=["experts.up_proj"])
    wrapped = peft.get_peft_model(hf.accelerate(transformers_model()), config).eval()
    ids, _ = padded("none")
    with pytest.raises(ValueError, match="does not support mixed adapter batches"):
        wrapped(ids, adapter_names=["default", "__base__", "default"])
