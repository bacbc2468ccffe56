"""Logits that are no numbers, and options at the edge of what a dtype holds."""

import pytest
import torch

from nemotron_v3.cache import NemotronHybridCache
from nemotron_v3.generation import generate, stream
from tests.models import tiny_model, tokens

EDGES = [1e-320, 1e-46, 1e-40, 1e-38, 1e38, 1e39, 1e300]
HALF_TINY = [number for number in EDGES if number <= 1]
WAYS = {
    "greedy": {},
    "drawn": {"do_sample": True, "seed": 0},
    "cut": {"do_sample": True, "seed": 0, "top_k": 5, "top_p": 0.9, "min_p": 0.01},
    "penalty": {"repetition_penalty": 1.3},
    "log-probabilities": {"return_logprobs": True},
}


def with_logit(value, row=None, token=7, step=0):
    """A model one logit of which is `value`, of all rows or one, from a forward pass on."""
    model = tiny_model("M*E")
    passes = []

    def put(module, args, out):
        out = out.clone()
        if len(passes) >= step:
            out[..., slice(None) if row is None else row, token] = value
        passes.append(out.shape)
        return out

    model.lm_head.register_forward_hook(put)
    return model


@pytest.mark.parametrize("way", WAYS)
@pytest.mark.parametrize("value", [float("nan"), float("inf")])
@pytest.mark.parametrize("count", [1, 3])
def test_a_row_without_numbers_is_named(way, value, count):
    options = WAYS[way] | {"max_new_tokens": count, "eos_token_id": []}
    with pytest.raises(FloatingPointError, match="row 1 has no new token 1.*not finite"):
        generate(with_logit(value, row=1), [[1, 2], [3]], **options)


def test_a_stream_gives_what_came_before():
    model = with_logit(float("nan"), step=2)
    came = stream(model, [5, 6], max_new_tokens=5, eos_token_id=[])
    assert [next(came).row, next(came).row] == [0, 0]
    with pytest.raises(FloatingPointError, match="row 0 has no new token 3"):
        next(came)


def test_a_cache_of_the_caller_holds_what_was_yielded():
    model = with_logit(float("nan"), step=2)
    cache = NemotronHybridCache(model.config, 1)
    came = stream(model, [5, 6], past_key_values=cache, max_new_tokens=5, eos_token_id=[])
    with pytest.raises(FloatingPointError):
        list(came)
    assert cache.withheld is None and cache.lengths == (4,)


def test_minus_infinity_is_a_token_that_never_comes():
    everything = slice(0, 90)
    for way in WAYS.values():
        model = with_logit(-float("inf"), token=everything)
        out = generate(model, tokens(4), max_new_tokens=20, eos_token_id=[], **way)
        assert all(90 <= token < 97 for token in out.new_tokens[0])
    with pytest.raises(FloatingPointError):
        generate(with_logit(-float("inf"), token=slice(None)), tokens(4), max_new_tokens=1)


@pytest.mark.parametrize("top", [{}, {"top_k": 5}, {"top_p": 0.5}, {"min_p": 0.5}])
@pytest.mark.parametrize("temperature", HALF_TINY)
def test_a_vanishing_temperature_draws_the_likeliest(temperature, top):
    model = tiny_model("M*E")
    options = {"max_new_tokens": 8, "eos_token_id": []}
    likeliest = generate(model, tokens(4), **options).new_tokens
    options |= {"do_sample": True, "temperature": temperature, "seed": 3} | top
    assert generate(model, tokens(4), **options).new_tokens == likeliest


@pytest.mark.parametrize("top_p", HALF_TINY)
def test_a_vanishing_top_p_draws_the_likeliest(top_p):
    model = tiny_model("M*E")
    options = {"max_new_tokens": 8, "eos_token_id": []}
    likeliest = generate(model, tokens(4), **options).new_tokens
    options |= {"do_sample": True, "top_p": top_p, "seed": 3}
    assert generate(model, tokens(4), **options).new_tokens == likeliest


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("name", ["temperature", "repetition_penalty"])
@pytest.mark.parametrize("value", EDGES)
def test_what_an_option_makes_of_logits_has_tokens(name, value, dtype):
    model = tiny_model("M*E").to(dtype)
    model.lm_head.register_forward_hook(lambda m, a, out: out.index_fill(-1, torch.tensor(7), 0.0))
    options = {"max_new_tokens": 20, "eos_token_id": [], "do_sample": True, "seed": 0, name: value}
    out = generate(model, tokens(2, 4), **options)
    assert all(0 <= token < 97 for row in out.new_tokens for token in row)
