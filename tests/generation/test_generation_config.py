"""What a checkpoint's generation config says is obeyed, refused, or without effect."""

import json

import pytest
import torch

from nemotron_v3.checkpoint import from_pretrained, save_pretrained
from nemotron_v3.generation import generate, stream
from nemotron_v3.generation.options import GenerationOptions
from tests.generation.samples import Bytes
from tests.models import tiny_model, tokens

RELEASED = {
    "_from_model_config": True,
    "bos_token_id": 1,
    "do_sample": True,
    "eos_token_id": [2, 11],
    "pad_token_id": 0,
    "temperature": 1.0,
    "top_p": 1.0,
    "transformers_version": "4.57.1",
    "use_cache": True,
    "num_beams": 1,
    "length_penalty": 2.0,
    "output_scores": False,
    "notes": {"by": "somebody"},
}


@pytest.fixture
def model():
    return tiny_model("M*E")


@pytest.mark.parametrize(
    ("file", "given", "expected"),
    [
        ({}, {}, {"do_sample": False, "max_new_tokens": None}),
        (RELEASED, {}, {"do_sample": True, "eos_token_id": [2, 11], "pad_token_id": 0}),
        ({"do_sample": True, "temperature": 0.6, "top_k": 20}, {"temperature": 0.9},
         {"do_sample": True, "temperature": 0.9, "top_k": 20}),
        ({"do_sample": True, "temperature": 0.6}, {"do_sample": False}, {"temperature": 1.0}),
        ({"do_sample": True, "temperature": 0.6}, {"temperature": 0},
         {"do_sample": False, "temperature": 0}),
        ({"temperature": 0.6, "top_p": 0.5}, {}, {"do_sample": False, "top_p": 1.0}),
        ({"temperature": 0.6}, {"do_sample": True}, {"temperature": 0.6}),
        ({"eos_token_id": [2]}, {"eos_token_id": []}, {"eos_token_id": []}),
        ({"eos_token_id": [2]}, {"eos_token_id": None}, {"eos_token_id": [2]}),
        ({"max_length": 20}, {}, {"max_length": 20, "max_new_tokens": None}),
        ({"max_length": 20, "max_new_tokens": 5}, {},
         {"max_length": None, "max_new_tokens": 5}),
        ({"max_length": 20}, {"max_new_tokens": 5}, {"max_length": None, "max_new_tokens": 5}),
        ({"max_new_tokens": 5}, {"max_length": 20}, {"max_length": 20, "max_new_tokens": None}),
        ({"temperature": None, "num_beams": None, "typical_p": 0.5}, {}, {"temperature": 1.0}),
    ],
)  # fmt: skip
def test_the_caller_goes_before_the_file_and_the_file_before_defaults(file, given, expected):
    before = json.dumps(file)
    options = GenerationOptions.of(given, file)
    assert {name: getattr(options, name) for name in expected} == expected
    assert json.dumps(file) == before


@pytest.mark.parametrize(
    ("file", "message"),
    [
        ({"num_beams": 4}, "num_beams=4, which is not supported"),
        ({"no_repeat_ngram_size": 3}, "no_repeat_ngram_size=3"),
        ({"min_new_tokens": 10}, "min_new_tokens=10"),
        ({"suppress_tokens": [5]}, r"suppress_tokens=\[5\]"),
        ({"do_sample": True, "typical_p": 0.5}, "typical_p=0.5"),
        ({"eos_token_ids": [2]}, "'eos_token_ids': 'eos_token_id' may be meant"),
        ({"temprature": 0.5}, "'temprature': 'temperature' may be meant"),
        ({"do_sample": True, "temperature": 0}, "in the model's generation_config, temperature 0"),
        ({"do_sample": True, "top_p": 7}, "in the model's generation_config, top_p must be"),
        ({"do_sample": "yes"}, "in the model's generation_config, do_sample"),
        ({"eos_token_id": "</s>"}, "in the model's generation_config, eos_token_id"),
        ({"eos_token_id": 2**70}, "outside the vocabulary"),
        ({"stop_strings": ["x"]}, "in the model's generation_config, stop_strings need a token"),
        ({"max_length": 4}, "max_length 4 leaves nothing behind a prompt of 4 tokens"),
    ],
)
@pytest.mark.parametrize("function", [generate, stream])
def test_what_cannot_be_obeyed_is_refused_at_the_call(model, function, file, message):
    model.generation_config = file
    with pytest.raises(ValueError, match=message):
        function(model, tokens(1, 4))


def test_it_acts(model):
    prompt, every = tokens(4, seed=1), {"eos_token_id": [], "max_new_tokens": 12}
    plain = generate(model, prompt, **every).new_tokens[0]
    drawn = generate(model, prompt, do_sample=True, temperature=3.0, seed=1, **every).new_tokens[0]
    assert plain != drawn
    model.generation_config = {"do_sample": True, "temperature": 3.0} | every
    assert generate(model, prompt, seed=1).new_tokens[0] == drawn
    assert [t.token_id for t in stream(model, prompt, seed=1)] == drawn
    assert generate(model, prompt, do_sample=False).new_tokens[0] == plain
    model.generation_config = {"eos_token_id": [96, plain[3]], "max_length": len(prompt) + 12}
    ended = plain[: plain.index(plain[3]) + 1]
    assert generate(model, prompt).new_tokens[0] == ended
    assert generate(model, prompt, eos_token_id=[]).new_tokens[0] == plain


def test_a_saved_copy_stops_where_the_model_does(model, tmp_path):
    prompt = tokens(4, seed=1)
    plain = generate(model, prompt, eos_token_id=[], max_new_tokens=8).new_tokens[0]
    model.generation_config = {"eos_token_id": [plain[2]], "max_new_tokens": 8}
    save_pretrained(model, tmp_path / "a")
    once = from_pretrained(tmp_path / "a")
    with torch.no_grad():
        once.model.norm_f.weight.mul_(1.0)
    save_pretrained(once, tmp_path / "b")
    twice = from_pretrained(tmp_path / "b")
    assert twice.generation_config == model.generation_config
    expected = plain[: plain.index(plain[2]) + 1]
    for each in (once, twice):
        assert generate(each, prompt, tokenizer=Bytes()).new_tokens[0] == expected


def test_numbers_beyond_64_bits_are_refused(model):
    for options, message in (
        ({"seed": 2**64}, "seed 18446744073709551616 is outside"),
        ({"seed": -(2**63) - 1}, "is outside the 64 bits"),
        ({"seed": [2**70]}, "is outside the 64 bits"),
        ({"seed": 2**64 - 1, "num_return_sequences": 2}, "is outside the 64 bits"),
        ({"pad_token_id": 2**64}, "pad_token_id 18446744073709551616"),
        ({"pad_token_id": -1}, "pad_token_id -1"),
        ({"max_new_tokens": 2**70}, "more than a computer counts"),
        ({"eos_token_id": 2**70}, "outside the vocabulary"),
        ({"temperature": 10**400}, "temperature 1000.* is more than a computer counts"),
        ({"repetition_penalty": 10**400}, "repetition_penalty 1000.* is more than"),
    ):
        with pytest.raises(ValueError, match=message):
            generate(model, tokens(1, 4), do_sample=True, **options)
    for prompt in ([2**64], [[1, -(2**70)]]):
        with pytest.raises(ValueError, match="no token id|outside the vocabulary"):
            generate(model, prompt)
    with pytest.raises(ValueError, match="row 1 holds half a character"):
        generate(model, ["a", "b\ud800"], tokenizer=Bytes())
    out = generate(model, tokens(1, 4), do_sample=True, seed=2**64 - 1, max_new_tokens=1)
    assert len(out.new_tokens[0]) == 1
