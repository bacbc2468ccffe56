"""A cache goes from any mode of autograd to any other, with the numbers of all tokens at once."""

from itertools import product

import pytest
import torch

from nemotron_v3 import NemotronHybridCache
from tests.models import tiny_model, tokens

MODELS = {pattern: tiny_model(pattern, chunk_size=8) for pattern in ("M", "*", "M*-M")}
MODES = {"grad": torch.enable_grad, "no_grad": torch.no_grad, "inference": torch.inference_mode}
IDS = tokens(1, 16)


def assert_near(measured: torch.Tensor, expected: torch.Tensor) -> None:
    assert (measured - expected).abs().max() <= 1e-5 * expected.abs().max()


def assert_ordinary(cache: NemotronHybridCache) -> None:
    held = [t for state in cache.states.values() for t in state.tensors().values()]
    assert not any(t.is_inference() for t in (*held, cache.positions))


@pytest.mark.parametrize("window", [0, 2])
@pytest.mark.parametrize("pattern", MODELS)
@pytest.mark.parametrize("modes", list(product(MODES, repeat=3)), ids="-".join)
def test_steps_in_any_modes(pattern, modes, window):
    model = MODELS[pattern]
    cache, logits = NemotronHybridCache(model.config, 1, rollback_window=window), []
    for part, mode in zip(IDS.split([5, 1, 10], dim=1), modes, strict=True):
        with MODES[mode]():
            logits.append(model(part, past_key_values=cache).logits.clone())
        assert_ordinary(cache)
    with torch.no_grad():
        assert_near(torch.cat([part.detach() for part in logits], 1), model(IDS).logits)
    loss = model(IDS[:, :2], past_key_values=cache, labels=IDS[:, :2]).loss
    torch.autograd.grad(loss, model.lm_head.weight)


def restored(cache):
    snapshot = cache.snapshot()
    cache.restore(snapshot)


def pushed(cache):
    for layer, conv in cache.conv_states.items():
        cache.update_conv_state(layer, conv.clone())


OPERATIONS = {
    "restore": restored,
    "rollback": lambda cache: cache.rollback(1),
    "clear": lambda cache: cache.clear(0),
    "reorder": lambda cache: cache.reorder_cache(torch.tensor([0])),
    "detach": lambda cache: cache.detach(),
    "update_conv_state": pushed,
    "select": lambda cache: cache.select([0]),
    "repeat": lambda cache: cache.repeat(1),
    "cat": lambda cache: NemotronHybridCache.cat([cache]),
}


@pytest.mark.parametrize("after", MODES)
@pytest.mark.parametrize("name", OPERATIONS)
def test_an_operation_in_inference_mode_on_a_cache_with_a_graph(name, after):
    model = MODELS["M*-M"]
    caches = []
    for mode in ("inference", "no_grad"):
        cache = NemotronHybridCache(model.config, 1, rollback_window=2)
        before = model(IDS[:, :5], past_key_values=cache).logits
        with MODES[mode]():
            cache = OPERATIONS[name](cache) or cache
        assert_ordinary(cache)
        torch.autograd.grad(before.square().sum(), model.lm_head.weight)  # its graph is whole
        caches.append(cache)
    with MODES[after]():
        measured, expected = (model(IDS[:, :2], past_key_values=c).logits for c in caches)
    assert torch.equal(measured, expected)
    for cache in caches:  # and it is written into in any mode
        cache.detach()
        with torch.no_grad():
            model(IDS[:, :1], past_key_values=cache)
        cache.rollback(1)


@pytest.mark.parametrize("name", ["q_proj", "k_proj", "v_proj", "o_proj"])
def test_a_loss_over_several_steps_where_one_projection_is_trained(name):
    """As adapters do: the others' keys or values have no graph, and stand in that of attention."""
    gradients = []
    for pieces in ([12], [5, 1, 6]):
        model = tiny_model("*-*").double().requires_grad_(False)
        weights = [getattr(model.model.layers[i].mixer, name).weight for i in (0, 2)]
        for weight in weights:
            weight.requires_grad_()
        cache = NemotronHybridCache(model.config, 1, torch.float64)
        parts = IDS[:, :12].split(pieces, dim=1)
        logits = torch.cat([model(part, past_key_values=cache).logits for part in parts], 1)
        gradients.append(torch.autograd.grad(logits.square().sum(), weights))
    for one, other in zip(*gradients, strict=True):
        assert (one - other).abs().max() <= 1e-10 * one.abs().max()


def test_layers_of_one_step_in_several_modes():
    """Tables that the first layer derives serve the others."""
    model = MODELS["M*-M"]
    layers, x = model.model.layers, torch.randn(2, 6, 48)
    mask = torch.tensor([[1] * 6, [1, 1, 0, 0, 0, 0]])
    cache = NemotronHybridCache(model.config, 2, rollback_window=2)
    with torch.inference_mode():
        layers[0](x, mask, past_key_values=cache)
        layers[1](x, mask, past_key_values=cache)
    layers[3](x, mask, past_key_values=cache).sum().backward()
    layers[0](x, mask, past_key_values=cache)
    layers[1](x, mask, past_key_values=cache).sum().backward()
    model.zero_grad()


def test_a_conv_state_that_is_replaced_leaves_the_graph_before_it_whole():
    model = MODELS["M"]
    cache = NemotronHybridCache(model.config, 1)
    loss = model(IDS[:, :5], past_key_values=cache).logits.square().sum()
    loss = loss + model(IDS[:, 5:9], past_key_values=cache).logits.square().sum()
    expected = torch.autograd.grad(loss, model.model.embeddings.weight, retain_graph=True)
    with torch.no_grad():
        cache.update_conv_state(0, torch.zeros(1, model.config.conv_dim))
    assert torch.equal(*expected, *torch.autograd.grad(loss, model.model.embeddings.weight))
