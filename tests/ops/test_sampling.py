"""The choice of a token on fixed buffers: the reference, and the sampler of `generate`."""

import pytest
import torch

from nemotron_v3 import ops
from nemotron_v3.generation.options import GenerationOptions
from nemotron_v3.generation.sampling import BLOCK, Sampler, Uniform
from nemotron_v3.ops.sampling import cases
from nemotron_v3.ops.sampling.op import NO_TOKEN
from tests.kernels.holding_sampling import draws, hold, sampled

SETTINGS = (
    {},
    {"temperature": 0.7},
    {"top_k": 9},
    {"top_p": 0.8},
    {"min_p": 0.05},
    {"temperature": 1.3, "top_k": 60, "top_p": 0.9, "min_p": 0.01, "repetition_penalty": 1.4},
    {"do_sample": False, "repetition_penalty": 1.4},
)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("case", cases.CASES, ids=lambda case: case.name)
def test_portable(case, dtype):
    hold(case, dtype, "cpu", "portable")


@pytest.mark.parametrize("settings", SETTINGS, ids=lambda s: "-".join(s) or "plain")
def test_tokens_are_those_of_generate(settings):
    """For the same seeds, step by step."""
    rows, V, steps = 4, 211, 20
    asked = {"do_sample": True, "return_logprobs": True} | settings
    options = GenerationOptions(**asked, seed=[3, 1, 4, 1] if asked["do_sample"] else None)
    prompts = [torch.randint(V, (5,)) for _ in range(rows)]
    sampler = Sampler(options, prompts, V, torch.empty(0))
    stream = Uniform(options.seeds(rows), torch.device("cpu")) if options.do_sample else None
    uniform = torch.zeros(BLOCK, rows, dtype=torch.float64)
    if stream is not None:
        uniform = torch.stack([stream() for _ in range(BLOCK)])

    def each(number, dtype=torch.float32):
        return torch.full((rows,), number, dtype=dtype)

    given = {"active": torch.ones(rows, dtype=torch.bool), "uniform": uniform}
    given |= {"drawn": each(0, torch.int64), "logprobs": each(0.0)}
    if options.do_sample:
        given |= {"temperature": each(options.temperature), "top_p": each(options.top_p)}
        given |= {"top_k": each(options.top_k, torch.int64), "min_p": each(options.min_p)}
    if options.repetition_penalty != 1:
        seen = torch.zeros(rows, V, dtype=torch.bool)
        for row, prompt in enumerate(prompts):
            seen[row, prompt] = True
        given |= {"penalty": each(options.repetition_penalty), "seen": seen}
    for _ in range(steps):
        logits = 2 * torch.randn(rows, V)
        tokens, logprobs = sampler(logits)
        assert torch.equal(ops.sample(logits, **given, impl="portable"), tokens)
        torch.testing.assert_close(given["logprobs"], logprobs)


@pytest.mark.parametrize("impl", ["portable", "reference"])
def test_logits_that_are_not_finite_give_no_token(impl):
    given = draws(cases.Case("bad", 4, 20, ("temperature", "top_p")), torch.float32, "cpu", 0)
    given["logits"][0, 3], given["logits"][1, 4] = torch.nan, torch.inf
    given["logits"][2] = -torch.inf
    given["logits"][3, ::2] = -torch.inf
    tokens = sampled(given, impl)["tokens"]
    assert (tokens[:, :3] == NO_TOKEN).all() and (tokens[:, 3] % 2 == 1).all()


@pytest.mark.parametrize("impl", ["portable", "reference"])
def test_slots_that_are_not_active_change_nothing(impl):
    given = draws(cases.CASES[7], torch.float32, "cpu", 0)
    given["active"][:] = False
    after = sampled(given, impl)
    assert all(torch.equal(after[k], given[k]) for k in ("drawn", "seen", "logprobs", "out"))


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"uniform": torch.ones(3, 8)}, "in torch.float32: torch.float64"),
        ({"drawn": torch.zeros(8)}, "drawn .* int64"),
        ({"top_k": torch.zeros(7, dtype=torch.int64)}, r"top_k \(7,\)"),
        ({"top_p": torch.ones(8, dtype=torch.bfloat16)}, "top_p .* fp32 or wider"),
        ({"seen": None}, "belong together"),
        ({"seen": torch.ones(8, 299, dtype=torch.bool)}, r"seen \(8, 299\)"),
        ({"active": torch.ones(8)}, "bool or integers"),
        ({"workspace": torch.ones(3)}, "contiguous elements in torch.float64"),
    ],
)
def test_what_does_not_fit_is_refused(changes, message):
    given = draws(cases.CASES[7], torch.float32, "cpu", 0)
    with pytest.raises(ValueError, match=message):
        ops.sample(**(given | changes))
