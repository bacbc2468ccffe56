"""The cache as code that was written for another one reads and writes it."""

import pytest
import torch

from nemotron_v3 import NemotronHybridCache
from tests.models import tiny_config, tiny_model, tokens

MODEL = tiny_model("M*-M").eval()
IDS = tokens(2, 9)


def fed(length=6, **options):
    cache = NemotronHybridCache(MODEL.config, 2, **options)
    with torch.no_grad():
        MODEL(IDS[:, :length], past_key_values=cache)
    return cache


@torch.no_grad()
def test_states_written_by_layer_are_those_that_a_pass_goes_on_from():
    source, cache = fed(), fed()
    for states in (cache.conv_states, cache.ssm_states):
        for layer in (0, 3):
            states[layer].zero_()
    for name in ("conv_states", "ssm_states"):
        for layer in (0, 3):
            tensor = getattr(source, name)[layer].clone()
            before = getattr(cache, name)[layer]
            getattr(cache, name)[layer] = tensor
            assert getattr(cache, name)[layer] is before  # in place
    expected = MODEL(IDS[:, 6:], past_key_values=source).logits
    assert torch.equal(MODEL(IDS[:, 6:], past_key_values=cache).logits, expected)


def test_a_mapping_of_states_is_updated_as_one():
    source, cache = fed(), fed(4)
    cache.conv_states.update(source.conv_states)
    assert list(cache.conv_states) == [0, 3] and len(cache.ssm_states) == 2
    assert all(torch.equal(cache.conv_states[i], source.conv_states[i]) for i in (0, 3))


def test_what_does_not_fit_is_refused_before_anything_is_written():
    cache = fed()
    before = cache.snapshot()
    with pytest.raises(KeyError, match=r"layer 1 has no such state: the layers are \[0, 3\]"):
        cache.conv_states[1] = torch.zeros(2, 124, 4)
    with pytest.raises(ValueError, match=r"\(2, 124, 3\) does not fit layer 0.*\(2, 124, 4\)"):
        cache.conv_states[0] = torch.zeros(2, 124, 3)
    with pytest.raises(ValueError, match=r"\(1, 6, 10, 16\) does not fit layer 3"):
        cache.ssm_states[3] = torch.zeros(1, 6, 10, 16)
    with pytest.raises(TypeError, match="a state is a list"):
        cache.ssm_states[3] = [0.0]
    with pytest.raises(TypeError, match="clear"):
        del cache.ssm_states[3]
    with pytest.raises(TypeError, match="update"):
        cache.key_cache[1] = torch.zeros(2, 2, 6, 20)
    with pytest.raises(KeyError, match="layer 0"):
        cache.value_cache[0]
    after = cache.snapshot()
    for layer, state in before.states.items():
        for name, tensor in state.tensors().items():
            assert torch.equal(getattr(after.states[layer], name), tensor)


def test_a_written_state_keeps_its_graph():
    cache = fed()
    start = torch.randn(2, 6, 10, 16, requires_grad=True)
    cache.ssm_states[0] = start
    MODEL(IDS[:, 6:], past_key_values=cache).logits.sum().backward()
    assert start.grad.abs().sum() > 0


@torch.no_grad()
def test_keys_and_values_are_those_that_update_returned():
    cache = NemotronHybridCache(MODEL.config, 2, max_length=16)
    k, v = torch.randn(2, 2, 5, 20), torch.randn(2, 2, 5, 20)
    cache.update(k, v, 1)
    assert torch.equal(cache.key_cache[1], k) and torch.equal(cache.value_cache[1], v)
    cache.finish()
    assert torch.equal(cache.key_cache[1], k)
    keys, _ = cache.update(k, v, 1)
    assert torch.equal(cache.key_cache[1], keys) and keys.shape[2] == 10
    assert list(cache.key_cache) == [1]


@torch.no_grad()
def test_has_previous_state_ends_a_pass():
    """A model that drives the layers says so where ours calls `finish`."""
    layers = [block for block in MODEL.model.layers if block.block_type != "mlp"]
    x, cache = torch.randn(2, 5, 48), NemotronHybridCache(MODEL.config, 2)
    assert not cache.has_previous_state
    cache.has_previous_state = False
    cache.has_previous_state = True
    assert cache.lengths == (0, 0)
    for block in layers:
        block(x, past_key_values=cache)
    cache.has_previous_state = True
    assert cache.positions.tolist() == [5, 5] and cache.has_previous_state
    cache.has_previous_state = True
    assert cache.lengths == (5, 5)
    with pytest.raises(ValueError, match=r"holds \[5, 5\] tokens.*clear.*restore"):
        cache.has_previous_state = False
    with pytest.raises(TypeError, match="has_previous_state is 1"):
        cache.has_previous_state = 1


def test_a_cache_of_another_class_is_named_with_its_module():
    other = type("NemotronHybridCache", (), {"__module__": "another.package"})()
    message = r"past_key_values is a another\.package\.NemotronHybridCache"
    with pytest.raises(TypeError, match=message):
        MODEL.model.layers[0](torch.randn(1, 4, 48), past_key_values=other)
    with pytest.raises(TypeError, match=message):
        MODEL.generate(IDS, past_key_values=other)


def test_a_cache_reads_of_a_foreign_config_what_it_needs():
    cache = NemotronHybridCache(tiny_config("M*-M"), 1)
    assert list(cache.states) == [0, 1, 3]
