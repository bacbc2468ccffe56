"""Bad input: what is said, and that the cache is as it was."""

import pytest
import torch

from nemotron_v3.cache import NemotronHybridCache
from nemotron_v3.generation import GenerationOptions, generate, stream
from tests.generation.samples import Bytes
from tests.models import tiny_model, tokens

MISTAKES = {
    "empty prompt": ({"input_ids": torch.zeros(1, 0, dtype=torch.int64)}, "row 0 is empty"),
    "an empty row": ({"input_ids": [[1, 2], []]}, "row 1 is empty or all padding"),
    "no row": ({"input_ids": []}, "holds no row"),
    "all padding": (
        {"input_ids": tokens(2, 3), "attention_mask": torch.tensor([[1, 1, 1], [0, 0, 0]])},
        "row 1 is empty or all padding",
    ),
    "mask of another shape": (
        {"input_ids": tokens(1, 3), "attention_mask": torch.ones(1, 4)}, r"shape \(1, 4\)",
    ),
    "mask beside a list": (
        {"input_ids": [[1]], "attention_mask": torch.ones(1, 1)}, "goes with a tensor",
    ),
    "outside the vocabulary": ({"input_ids": [[3, 97]]}, "token 97, outside the vocabulary of 97"),
    "negative token": ({"input_ids": [[3, -1]]}, "token -1, outside"),
    "three dimensions": ({"input_ids": tokens(1, 2, 3)}, r"shape \(1, 2, 3\)"),
    "rows in two dimensions": ({"input_ids": [tokens(1, 2)]}, r"of the list has shape \(1, 2\)"),
    "text without tokenizer": ({"input_ids": "a"}, "need a tokenizer"),
    "no new token": ({"max_new_tokens": 0}, "max_new_tokens must be at least 1, got 0"),
    "negative temperature": ({"do_sample": True, "temperature": -0.5}, "not be negative, got -0.5"),
    "temperature 0": ({"do_sample": True, "temperature": 0.0}, "leave do_sample out"),
    "nan temperature": ({"do_sample": True, "temperature": float("nan")}, "got nan"),
    "temperature, greedy": ({"temperature": 0.7}, "=0.7 has no effect without do_sample"),
    "top_p, greedy": ({"top_p": 0.9}, "top_p=0.9 has no effect without do_sample"),
    "top_p 0": ({"do_sample": True, "top_p": 0.0}, "above 0 and at most 1, got 0.0"),
    "top_p above 1": ({"do_sample": True, "top_p": 1.1}, "at most 1, got 1.1"),
    "top_k": ({"do_sample": True, "top_k": -1}, "top_k must be at least 0"),
    "min_p": ({"do_sample": True, "min_p": 2.0}, "min_p must be from 0 to 1, got 2.0"),
    "penalty": ({"repetition_penalty": 0.0}, "above 0 .*, got 0.0"),
    "no sequence": ({"num_return_sequences": 0}, "at least 1, got 0"),
    "no piece": ({"prefill_chunk": 0}, "prefill_chunk must be at least 1, got 0"),
    "seeds": ({"do_sample": True, "seed": [1, 2, 3]}, "3 seeds for 1 rows"),
    "stop strings": ({"stop_strings": "."}, "need a tokenizer"),
    "empty stop string": ({"stop_strings": ["a", ""], "tokenizer": Bytes()}, "is empty"),
}  # fmt: skip
MISTAKES |= {
    "an eos token of no vocabulary": ({"eos_token_id": 97}, "97 is outside the vocabulary of 97"),
    "a negative eos token": ({"eos_token_id": [1, -1]}, "eos_token_id -1 is outside"),
    "tokens without values": ({"input_ids": tokens(1, 3).to("meta")}, "on the meta device"),
}
TYPE_MISTAKES = {
    "mask that is a list": (
        {"input_ids": tokens(1, 3), "attention_mask": [[1, 1, 1]]}, "attention_mask is a list",
    ),
    "text for a number": ({"temperature": "1"}, "temperature must be a number, got '1'"),
    "no number": ({"top_p": None}, "top_p must be a number, got None"),
    "a truth for a number": ({"repetition_penalty": True}, "must be a number, got True"),
    "a word for a truth": ({"do_sample": "yes"}, "do_sample must be True or False, got 'yes'"),
    "a seed of text": ({"do_sample": True, "seed": "a"}, "seed must be integers, got 'a'"),
    "a fractional seed": ({"do_sample": True, "seed": [1.5]}, "seed must be integers, got 1.5"),
    "an eos token of text": ({"eos_token_id": "</s>"}, "eos_token_id must be integers, got '<'"),
    "a fractional eos token": ({"eos_token_id": 1.5}, "eos_token_id must be integers, got 1.5"),
    "pad tokens": ({"pad_token_id": [0]}, r"pad_token_id must be integers, got \[0\]"),
    "a stop string that is a number": ({"stop_strings": ["a", 5]}, "must be texts, got 5"),
    "stop strings that are a number": ({"stop_strings": 5}, "must be texts, got 5"),
    "unknown option": ({"top_kk": 3}, "'top_kk'"),
    "float tokens": ({"input_ids": torch.ones(1, 3)}, "torch.float32"),
    "a dict": ({"input_ids": {"input_ids": [1]}}, "is a dict"),
    "fraction of a token": ({"max_new_tokens": 2.5}, "must be an int, got 2.5"),
}  # fmt: skip


@pytest.fixture(scope="module")
def model():
    return tiny_model("M*E")


def held(cache):
    """All it holds, as plain values."""
    states = cache.snapshot().states
    return cache.lengths, {
        (layer, name): tensor.tolist()
        for layer, state in states.items()
        for name, tensor in state.tensors().items()
    }


@pytest.mark.parametrize("function", [generate, stream])
@pytest.mark.parametrize(
    ("error", "arguments", "message"),
    [(ValueError, *case) for case in MISTAKES.values()]
    + [(TypeError, *case) for case in TYPE_MISTAKES.values()],
    ids=[*MISTAKES, *TYPE_MISTAKES],
)
def test_a_mistake_is_named_at_the_call(model, function, error, arguments, message):
    arguments = {"input_ids": tokens(1, 4)} | arguments
    with pytest.raises(error, match=message):
        function(model, **arguments)


def other_caches(model):
    config = model.config
    yield "config", NemotronHybridCache(tiny_model("MM").config, 2), "another config"
    yield "batch", NemotronHybridCache(config, 3), "the cache has 3 rows, input_ids 2"
    yield "dtype", NemotronHybridCache(config, 2, torch.bfloat16), "holds torch.bfloat16"
    yield "length", NemotronHybridCache(config, 2, max_length=10), "max_length 10"


@pytest.mark.parametrize("kind", ["config", "batch", "dtype", "length"])
def test_a_cache_that_does_not_fit_is_left_alone(model, kind):
    cache, message = next((c, m) for k, c, m in other_caches(model) if k == kind)
    before = held(cache)
    with pytest.raises(ValueError, match=message):
        generate(model, tokens(2, 8), max_new_tokens=4, past_key_values=cache)
    assert held(cache) == before


def test_a_fixed_cache_takes_what_just_fits(model):
    cache = NemotronHybridCache(model.config, 2, max_length=11)
    out = generate(model, tokens(2, 8), max_new_tokens=4, past_key_values=cache, eos_token_id=[])
    assert cache.lengths == (11, 11) and out.lengths == (12, 12)


def test_a_cache_that_holds_the_whole_prompt_is_left_alone(model):
    cache = NemotronHybridCache(model.config, 2)
    with torch.no_grad():
        model(tokens(2, 6), past_key_values=cache)
    before = held(cache)
    with pytest.raises(ValueError, match="row 0 of the cache holds 6 tokens, its prompt has 6"):
        generate(model, tokens(2, 6), past_key_values=cache)
    assert held(cache) == before


def test_a_foreign_cache_is_named(model):
    with pytest.raises(TypeError, match="past_key_values is a dict"):
        generate(model, tokens(1, 4), past_key_values={})


def test_a_seed_without_draws_is_refused():
    with pytest.raises(ValueError, match="seed=3 has no effect without do_sample=True: add it"):
        GenerationOptions.of({"seed": 3})
