"""generate() and single passes with transformers' own caches."""

import copy

import pytest
import torch
from transformers import DynamicCache, StaticCache

from nemotron_v3 import NemotronHybridCache
from nemotron_v3.hf import undo
from tests.hf.models import (
    LATENT,
    accelerated,
    close,
    documents,
    right_padded,
    tokens,
    transformers_model,
)

GREEDY = {"do_sample": False, "pad_token_id": 0, "eos_token_id": None}


@pytest.fixture(scope="module", params=[{}, LATENT], ids=["all blocks", "latent and biases"])
def pair(request):
    plain = transformers_model(**request.param)
    return plain, accelerated(plain)


def test_100_greedy_tokens(pair):
    plain, ours = pair
    prompts = tokens(2, 9)
    expected, found = (
        model.generate(prompts, max_new_tokens=100, **GREEDY) for model in (plain, ours)
    )
    assert torch.equal(found, expected)


@pytest.mark.parametrize("cache", ["dynamic", "static"])
def test_left_padding_is_as_each_prompt_alone(pair, cache):
    plain, ours = pair
    docs = documents((3, 11, 6))
    batch = right_padded(docs, left=True)
    batch.pop("labels")
    options = GREEDY | {"max_new_tokens": 20}
    if cache == "static":
        options |= {"cache_implementation": "static", "disable_compile": True}
    found = ours.generate(**batch, **options)[:, 11:]
    expected = [plain.generate(d, max_new_tokens=20, **GREEDY)[:, d.shape[1] :] for d in docs]
    assert torch.equal(found, torch.cat(expected))


@pytest.mark.parametrize("pieces", [[1] * 11, [2, 1, 1, 4, 1, 2]])
@pytest.mark.parametrize("left", [True, False])
def test_padding_may_come_one_token_at_a_time(pair, left, pieces):
    """Behind a cache, where a mask says so, a token is not real."""
    _, ours = pair
    docs = documents((3, 11, 6))
    batch = right_padded(docs, left=left)
    cache = DynamicCache(config=ours.config)
    logits, end = [], 0
    with torch.no_grad():
        for piece in batch["input_ids"].split(pieces, dim=1):
            end += piece.shape[1]
            mask = batch["attention_mask"][:, :end]
            logits.append(ours(piece, attention_mask=mask, past_key_values=cache).logits)
        logits = torch.cat(logits, 1)
        for row, doc in enumerate(docs):
            real = batch["attention_mask"][row] == 1
            assert close(logits[row, real], ours(doc).logits[0])
            assert not logits[row, ~real].any()


def test_beams_reorder_the_states(pair):
    plain, ours = pair
    options = GREEDY | {"num_beams": 3, "max_new_tokens": 15, "num_return_sequences": 2}
    expected, found = (model.generate(tokens(2, 7), **options) for model in pair)
    assert torch.equal(found, expected)


def test_sampling_with_a_seed(pair):
    drawn = []
    for model in pair:
        torch.manual_seed(1)
        options = GREEDY | {"do_sample": True, "top_k": 5, "num_return_sequences": 3}
        drawn.append(model.generate(tokens(1, 7), max_new_tokens=12, **options))
    assert torch.equal(*drawn)


def test_from_embeddings(pair):
    """transformers' generate() takes none for this model; a pass does, with a cache too."""
    plain, ours = pair
    embeds = plain.model.embeddings(tokens(2, 8)).detach()
    expected = plain(inputs_embeds=embeds).logits
    assert close(ours(inputs_embeds=embeds).logits, expected)
    with torch.no_grad():
        first = ours(inputs_embeds=embeds[:, :5])
        second = ours(inputs_embeds=embeds[:, 5:], past_key_values=first.past_key_values)
    assert close(torch.cat([first.logits, second.logits], 1), expected)


def test_without_a_cache(pair):
    plain, ours = pair
    found = ours.generate(tokens(1, 5), max_new_tokens=8, use_cache=False, **GREEDY)
    assert torch.equal(found, plain.generate(tokens(1, 5), max_new_tokens=8, **GREEDY))


@pytest.mark.parametrize("kind", ["dynamic", "static"])
@pytest.mark.parametrize("pieces", [(30,), (7, 23), (1, 1, 28), (20, 1, 9)])
def test_in_pieces(pair, pieces, kind):
    """A prompt in any pieces is the prompt: padded or not, and whatever a piece's length."""
    _, ours = pair
    config = ours.config
    static = kind == "static"
    cache = StaticCache(config=config, max_cache_len=40) if static else DynamicCache(config=config)
    ids, found, start = tokens(2, 30), [], 0
    with torch.no_grad():
        expected = ours(ids, use_cache=False).logits
        for n in pieces:
            piece = ids[:, start : start + n]
            out = ours(piece, past_key_values=cache)
            assert out.past_key_values is cache
            found.append(out.logits)
            start += n
    assert close(torch.cat(found, 1), expected)
    assert int(cache.get_seq_length()) == 30


def test_padding_inside_later_pieces(pair):
    """Rows of different lengths in every piece: the mask covers what the cache holds as well."""
    _, ours = pair
    docs = documents((12, 17))
    cache = DynamicCache(config=ours.config)
    mask = torch.zeros(2, 0, dtype=torch.int64)
    found = [[], []]
    with torch.no_grad():
        for lengths in ((5, 9), (1, 1), (6, 7)):  # right-padded
            S = max(lengths)
            ids = torch.zeros(2, S, dtype=torch.int64)
            new = torch.zeros(2, S, dtype=torch.int64)
            for row, n in enumerate(lengths):
                seen = int(mask[row].sum())
                ids[row, :n] = docs[row][0, seen : seen + n]
                new[row, :n] = 1
            mask = torch.cat([mask, new], 1)
            logits = ours(ids, attention_mask=mask, past_key_values=cache).logits
            for row, n in enumerate(lengths):
                found[row].append(logits[row, :n])
        for row, doc in enumerate(docs):
            assert close(torch.cat(found[row]), ours(doc, use_cache=False).logits[0])


def test_a_cache_goes_from_plain_to_accelerated_and_back(pair):
    plain, ours = pair
    ids = tokens(2, 24)
    with torch.no_grad():
        expected = plain(ids).logits
        cache, found = DynamicCache(config=plain.config), []
        for turn, start in enumerate(range(0, 24, 6)):
            model = (plain, ours)[turn % 2]
            found.append(model(ids[:, start : start + 6], past_key_values=cache).logits)
        found = torch.cat(found, 1)
        more = tokens(2, 4, seed=1)
        expected = torch.cat([expected, plain(torch.cat([ids, more], 1)).logits[:, 24:]], 1)
        for turn, column in enumerate(more.split(1, 1)):  # and token by token
            logits = (ours, plain)[turn % 2](column, past_key_values=cache).logits
            found = torch.cat([found, logits], 1)
    assert close(found, expected)


def test_a_4d_mask_decides_alone(pair):
    plain, ours = pair
    ids = tokens(2, 12)
    mask = torch.ones(12, 12, dtype=torch.bool).tril()
    mask[5:, 2] = False
    mask = mask.expand(2, 1, 12, 12)
    additive = torch.zeros(mask.shape).masked_fill(~mask, float("-inf"))
    expected = plain(ids, attention_mask=mask).logits
    assert close(ours(ids, attention_mask=mask).logits, expected)
    assert close(ours(ids, attention_mask=additive).logits, expected)
    assert not close(ours(ids).logits, expected, 1e-3)


def test_a_cache_is_made_when_transformers_makes_one(pair):
    plain, ours = pair
    ids = tokens(1, 6)
    assert ours(ids).past_key_values.get_seq_length() == 6
    assert ours(ids, use_cache=False).past_key_values is None
    packed = ours(ids, position_ids=torch.tensor([[0, 1, 0, 1, 2, 3]]))
    assert packed.past_key_values is None
    training = copy.deepcopy(ours).train()
    assert training(ids).past_key_values is None
    assert training(ids, use_cache=True).past_key_values.get_seq_length() == 6


def test_what_a_cache_cannot_be(pair):
    _, ours = pair
    ids = tokens(1, 4)
    with pytest.raises(TypeError, match="NemotronHybridCache: an accelerated model takes"):
        ours(ids, past_key_values=NemotronHybridCache(ours.config, 1))
    with pytest.raises(ValueError, match="make it from the model's config"):
        ours(ids, past_key_values=DynamicCache())
    with pytest.raises(ValueError, match="2 documents in a batch of 1 rows and a cache"):
        ours(ids, use_cache=True, position_ids=torch.tensor([[0, 1, 0, 1]]))
    recording = DynamicCache(config=ours.config)
    recording.activate_past_recording()
    with pytest.raises(ValueError, match="records past states"):
        ours(ids, past_key_values=recording)


@pytest.mark.parametrize("of", ["model", "backbone", "mamba", "attention"])
def test_a_cache_has_two_names(pair, of):
    """`past_key_values` (a mixer's `cache_params`), and `cache` since transformers 5.24."""
    _, ours = pair
    mixers = {type(block.mixer).__name__: block.mixer for block in ours.model.layers}
    module = {
        "model": ours,
        "backbone": ours.model,
        "mamba": mixers["NemotronHMamba2Mixer"],
        "attention": mixers["NemotronHAttention"],
    }[of]
    old = "cache_params" if of == "mamba" else "past_key_values"
    ids = tokens(2, 7)
    x = ids if of in ("model", "backbone") else ours.model.embeddings(ids)
    caches = [DynamicCache(config=ours.config) for _ in range(3)]

    def run(x, **cache):
        with torch.no_grad():
            out = module(x, **cache)
        return out if isinstance(out, torch.Tensor) else out[0]

    for piece in (x[:, :4], x[:, 4:5], x[:, 5:]):
        first, second, both = (
            run(piece, **names)
            for names in (
                {old: caches[0]}, {"cache": caches[1]}, {old: caches[2], "cache": caches[2]}
            )
        )  # fmt: skip
        assert torch.equal(first, second) and torch.equal(first, both)
    assert close(first, run(x)[:, 5:])
    with pytest.raises(ValueError, match="two names of one argument"):
        run(x, **{old: caches[0], "cache": caches[1]})


@pytest.mark.parametrize(
    "kept, error",
    [
        (-1, ValueError),
        (True, TypeError),
        ("all", TypeError),
        (torch.tensor([0, 4]), ValueError),
        (torch.tensor(-5), ValueError),
        (torch.tensor([True, False, True]), ValueError),
    ],
)
def test_logits_that_cannot_be_kept_leave_the_cache_alone(pair, kept, error):
    _, ours = pair
    cache = DynamicCache(config=ours.config)
    with pytest.raises(error, match="logits_to_keep"):
        ours(tokens(1, 4), past_key_values=cache, logits_to_keep=kept)
    assert cache.get_seq_length() == 0 and not cache.has_previous_state(0)


def test_which_logits_are_kept(pair):
    _, ours = pair
    ids = tokens(2, 6)
    whole = ours(ids).logits
    mask = torch.tensor([True, False, False, True, True, False])
    for kept, places in ((2, slice(4, 6)), (mask, mask), (torch.tensor([3, 0]), [3, 0])):
        assert close(ours(ids, logits_to_keep=kept).logits, whole[:, places])


def test_gradients_through_a_cache():
    """In eval mode with gradients on, a cache changes nothing about them."""
    ours = accelerated(transformers_model())
    ids = tokens(1, 12)
    ours(ids, labels=ids, use_cache=False).loss.backward()
    expected = {n: p.grad.clone() for n, p in ours.named_parameters()}
    ours.zero_grad()
    ours(ids, labels=ids, use_cache=True).loss.backward()
    for name, parameter in ours.named_parameters():
        assert torch.equal(parameter.grad, expected[name]), name


def test_undone_after_generating(pair):
    plain, ours = pair
    model = copy.deepcopy(ours)
    undo(model)
    ids = tokens(1, 5)
    a, b = (m.generate(ids, max_new_tokens=5, **GREEDY) for m in (plain, model))
    assert torch.equal(a, b)
