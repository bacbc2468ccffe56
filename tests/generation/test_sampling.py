"""Sampling against distributions worked out token by token."""

import itertools

import pytest
import torch

from nemotron_v3.generation import generate
from nemotron_v3.generation.options import GenerationOptions
from nemotron_v3.generation.sampling import (
    BLOCK,
    Sampler,
    Uniform,
    candidates,
    invert,
    penalize_repetition,
)
from tests.generation.samples import prompts
from tests.models import tiny_model, tokens

V = 13
NO_EOS = {"eos_token_id": []}


def brute_force(logits, top_k, top_p, min_p):
    """The distribution of one row, by lists."""
    ranked = sorted(enumerate(torch.softmax(logits.double(), 0).tolist()), key=lambda x: -x[1])
    ranked = ranked[: top_k or None]
    total = sum(p for _, p in ranked)
    kept, reached = [], 0.0
    for token, p in ranked:
        if top_p < 1 and reached >= top_p:
            break
        reached += p / total
        kept.append((token, p))
    kept = [(token, p) for token, p in kept if p >= min_p * ranked[0][1]]
    total = sum(p for _, p in kept)
    return {token: p / total for token, p in kept}


GRID = list(itertools.product([0, 1, 4, 40], [0.3, 0.8, 1.0], [0.0, 0.2, 1.0]))


@pytest.mark.parametrize(("top_k", "top_p", "min_p"), GRID)
def test_candidates_are_those_of_brute_force(top_k, top_p, min_p):
    logits = 2 * torch.randn(20, V)
    probabilities, drawn = candidates(logits, top_k, top_p, min_p)
    if drawn is None:
        drawn = torch.arange(V).expand(20, V)
    spread = torch.zeros(20, V).scatter_(1, drawn, probabilities)
    for row in range(20):
        expected = torch.zeros(V)
        for token, p in brute_force(logits[row], top_k, top_p, min_p).items():
            expected[token] = p
        torch.testing.assert_close(spread[row], expected, rtol=1e-5, atol=1e-7)


def test_draws_have_the_distribution():
    logits = torch.randn(1, V)
    options = GenerationOptions(do_sample=True, temperature=0.6, top_k=8, top_p=0.9, seed=0)
    rows = 20_000
    sampler = Sampler(options, [torch.tensor([0])] * rows, V, logits)
    counts = torch.bincount(sampler(logits.expand(rows, V))[0], minlength=V) / rows
    expected = torch.zeros(V)
    for token, p in brute_force(logits[0] / 0.6, 8, 0.9, 0.0).items():
        expected[token] = p
    # Six standard deviations of a count.
    assert ((counts - expected).abs() <= 6 * (expected * (1 - expected) / rows).sqrt()).all()


def test_a_draw_never_takes_a_token_of_probability_zero():
    probabilities = torch.tensor([[0.0, 0.5, 0.0, 0.5, 0.0]])
    largest = 1 - 2**-53
    for uniform, expected in ((0.0, 1), (0.4999, 1), (0.5, 3), (largest, 3)):
        drawn = invert(probabilities, torch.tensor([uniform], dtype=torch.float64))
        assert drawn.item() == expected
    # Rounded up, uniform * total is the total itself.
    thirds = torch.full((1, 3), 1 / 3)
    assert invert(thirds, torch.tensor([largest], dtype=torch.float64)).item() == 2


def test_penalty_divides_what_is_likely_and_multiplies_what_is_not():
    logits = torch.tensor([[2.0, -2.0, 2.0, 0.0]])
    seen = torch.tensor([[True, True, False, True]])
    assert penalize_repetition(logits, seen, 4.0).tolist() == [[0.5, -8.0, 2.0, 0.0]]


def test_penalty_counts_the_prompt_and_what_was_generated():
    model = tiny_model()
    prompt = tokens(9, seed=1)
    out = generate(model, prompt, max_new_tokens=30, repetition_penalty=1e6, **NO_EOS)
    new = out.new_tokens[0]
    assert len(set(new)) == 30 and not set(new) & set(prompt.tolist())
    # The same, one token after another.
    sequence = prompt.tolist()
    for token in new[:10]:
        with torch.no_grad():
            logits = model(torch.tensor([sequence])).logits[0, -1]
        for held in set(sequence):
            logits[held] = logits[held] / 1e6 if logits[held] > 0 else logits[held] * 1e6
        assert logits.argmax().item() == token
        sequence.append(token)


@pytest.mark.parametrize("options", [{}, {"top_k": 10, "top_p": 0.9}, {"temperature": 0.5}])
def test_a_seed_gives_its_tokens_whatever_is_in_the_batch(options):
    model = tiny_model()
    rows = prompts((5, 9, 3, 7))
    options = options | {"do_sample": True, "max_new_tokens": BLOCK + 10} | NO_EOS
    together = generate(model, rows, seed=[11, 12, 13, 14], **options).new_tokens
    for row, its in enumerate(together):
        assert generate(model, rows[row], seed=11 + row, **options).new_tokens == [its]
    assert generate(model, rows, seed=11, **options).new_tokens == together
    backwards = generate(model, rows[::-1], seed=[14, 13, 12, 11], **options).new_tokens
    assert backwards == together[::-1]
    assert len(set(map(tuple, together))) == 4


def test_a_row_keeps_its_draws_when_others_end():
    model = tiny_model()
    rows = prompts((5, 9, 3, 7))
    options = {"do_sample": True, "max_new_tokens": 40, "seed": 3}
    free = generate(model, rows, **options, **NO_EOS).new_tokens
    eos = free[0][3]
    out = generate(model, rows, eos_token_id=eos, **options)
    assert len(out.new_tokens[0]) <= 4 and len(set(map(len, out.new_tokens))) > 1
    for short, long in zip(out.new_tokens, free, strict=True):
        assert short == long[: len(short)]


def test_without_a_seed_torchs_own_decides():
    model = tiny_model()
    options = {"do_sample": True, "max_new_tokens": 10} | NO_EOS
    draws = []
    for seed in (0, 0, 1):
        torch.manual_seed(seed)
        draws.append(generate(model, tokens(4), **options).new_tokens)
    assert draws[0] == draws[1] != draws[2]
    assert generate(model, tokens(4), **options).new_tokens != draws[2]


def test_uniform_numbers_go_on_across_blocks_and_leaving_rows():
    both = Uniform([5, 6], torch.device("cpu"))
    alone = Uniform([6], torch.device("cpu"))
    for step in range(2 * BLOCK + 5):
        if step == BLOCK // 2:
            both.select([1], torch.tensor([1]))
        assert both()[-1] == alone()[0]


@pytest.mark.parametrize(
    "asked",
    [
        {},
        {"repetition_penalty": 1.3, "return_logprobs": True},
        {"do_sample": True, "temperature": 0.7},
        {"do_sample": True, "top_p": 0.8, "return_logprobs": True},
        {"do_sample": True, "top_k": 5, "min_p": 0.05},
        {"do_sample": True, "top_k": 9, "top_p": 0.9, "repetition_penalty": 0.8},
    ],
    ids=str,
)
def test_the_choice_of_a_gpu_is_the_same(asked):
    """Over more steps than there are numbers in a block; rows leave, and one has no token."""
    options = GenerationOptions(**asked, seed=4 if asked.get("do_sample") else None)
    given = [torch.tensor([1, 2]), torch.tensor([3]), torch.tensor([7, 8])]
    ways = [Sampler(options, given, 61, torch.empty(0), on_slots=on) for on in (False, True)]
    steps = BLOCK + 6
    for step in range(steps):
        if step == 3:
            for sampler in ways:
                sampler.select([0, 2], torch.tensor([0, 2]))
        logits = 2 * torch.randn(3 if step < 3 else 2, 61)
        if step == steps - 1:
            logits[1, 4] = torch.nan
        (tokens, logprobs), (others, of_others) = (sampler(logits.clone()) for sampler in ways)
        assert torch.equal(tokens, others)
        if logprobs is not None:
            torch.testing.assert_close(logprobs, of_others, equal_nan=True)
    assert tokens[1] == -1 != tokens[0]
