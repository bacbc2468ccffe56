"""Low-rank updates in a step on fixed buffers: PEFT's beside projections, those of experts."""

from types import SimpleNamespace

import pytest
import torch
from torch import nn

from nemotron_v3 import NemotronHybridCache
from nemotron_v3.generation.graphs import GraphStep
from nemotron_v3.generation.graphs.fits import _why_not_modules
from nemotron_v3.generation.graphs.graph import fixed_by
from tests.generation.test_graphs import filled, model_of

peft = pytest.importorskip("peft")
GROUPS = {"*": ("attention",), "M": ("mamba",), "-": ("mlp",), "E": ("shared", "routed")}


def adapted(pattern: str = "ME*-", **more):
    """Every projection and all experts with updates that count."""
    from nemotron_v3.hf import lora

    model = model_of(pattern, **more)
    groups = tuple(name for kind in set(pattern) for name in GROUPS[kind])
    groups += ("latent",) if more else ()
    options = SimpleNamespace(rank=4, alpha=8.0, groups=groups, dropout=0.1)
    lora.add(model, options)
    for name, parameter in model.named_parameters():
        if "lora_B" in name or name.endswith(("up_b", "down_b")):
            parameter.data.normal_(std=0.3)
    return model.eval().requires_grad_(False)


def hold(model) -> torch.Tensor:
    """A step's logits, which are forward's."""
    cache, _ = filled(model, (3, 1))
    truth = NemotronHybridCache(model.config, 2, torch.float32)
    truth.restore(cache.snapshot())
    step = GraphStep(model, cache)
    tokens = torch.tensor([5, 11])
    with torch.no_grad():
        expected = model(tokens[:, None], past_key_values=truth).logits[:, 0]
    found = step(tokens).clone()
    torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-5)
    step.close()
    return found


@pytest.mark.parametrize("more", [{}, {"moe_latent_size": 16}], ids=["plain", "latent"])
def test_a_step_is_forwards(more):
    model = adapted(**more)
    assert _why_not_modules(model, "the model") is None
    torch.manual_seed(1)
    hold(model)


def test_updates_that_are_off_merged_or_other_make_a_new_graph():
    model = adapted("ME")
    fixed = {fixed_by(model)}
    torch.manual_seed(1)
    with_updates = hold(model)
    layers = [m for m in model.modules() if hasattr(m, "lora_A")]
    experts = model.model.layers[1].mixer.experts
    for change in (
        lambda: [layer.enable_adapters(False) for layer in layers],
        lambda: experts.merge_low_rank(),
        lambda: [layer.enable_adapters(True) for layer in layers],
        lambda: layers[0].set_scale("default", 3.0),
        lambda: layers[0].merge(),
    ):
        change()
        torch.manual_seed(1)
        hold(model)
        assert fixed_by(model) not in fixed
        fixed.add(fixed_by(model))
    torch.manual_seed(1)
    assert not torch.allclose(hold(model), with_updates, atol=1e-3)


def test_updates_that_change_in_place_count():
    model = adapted("M*")
    fixed = fixed_by(model)
    for name, parameter in model.named_parameters():
        if "lora_A" in name:
            parameter.mul_(-1.5)
    assert fixed_by(model) == fixed
    hold(model)


def test_what_a_step_does_not_compute_is_called():
    def reason(change) -> str:
        model = adapted("M")
        change(next(m for m in model.modules() if hasattr(m, "lora_A")))
        return _why_not_modules(model, "the model") or ""

    def second(layer):
        layer.update_layer("more", 2, lora_alpha=2, config=peft.LoraConfig(r=2, lora_alpha=2))
        layer.set_adapter(["default", "more"])

    assert "2 active adapters" in reason(second)
    assert "dropout is on" in reason(lambda layer: layer.train())
    assert "hooks" in reason(lambda layer: layer.lora_A["default"].register_forward_hook(print))
    assert "is a Sequential" in reason(lambda layer: setattr(layer, "base_layer", nn.Sequential()))
    assert "bias" in reason(
        lambda layer: setattr(layer.lora_B["default"], "bias", nn.Parameter(torch.zeros(4)))
    )
