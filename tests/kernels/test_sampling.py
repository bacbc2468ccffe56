"""The kernels of sampling in Triton's interpreter: the reference's tokens."""

import pytest
import torch

from nemotron_v3 import ops
from nemotron_v3.ops.sampling import cases
from nemotron_v3.ops.sampling.op import NO_TOKEN, workspace_size
from tests.kernels.holding_sampling import draws, hold, sampled

pytest.importorskip("triton")
pytestmark = pytest.mark.skipif(torch.cuda.is_available(), reason="tests/gpu runs them compiled")


CUT = ("temperature", "top_p", "min_p", "penalty")
# An interpreted program of a search takes a fifth of a second.
SMALL = (
    cases.Case("greedy-penalty", 3, 300, ("penalty",), strided=True),
    cases.Case("plain-min-p", 3, 300, ("temperature", "min_p")),
    cases.Case("top-p-equal", 2, 300, ("temperature", "top_p"), equal=True),
    pytest.param(cases.CASES[7], marks=pytest.mark.heavy),
    pytest.param(cases.CASES[8], marks=pytest.mark.heavy),
    pytest.param(cases.CASES[9], marks=pytest.mark.heavy),
)


@pytest.mark.parametrize("case", SMALL, ids=lambda case: case.name)
def test_tokens(case):
    dtype = torch.bfloat16 if case.equal else torch.float32
    hold(case, dtype, "cpu", "triton", draws_of=1, steps=1)


def test_logits_that_are_not_finite_give_no_token():
    given = draws(cases.Case("bad", 4, 20, ("temperature", "min_p")), torch.float32, "cpu", 0)
    given["logits"][0, 3], given["logits"][1, 4] = torch.nan, torch.inf
    given["logits"][2] = -torch.inf
    given["logits"][3, ::2] = -torch.inf
    tokens = sampled(given, "triton", 1)["tokens"]
    assert (tokens[:, :3] == NO_TOKEN).all() and (tokens[:, 3] % 2 == 1).all()


def test_slots_that_are_not_active_change_nothing_and_a_used_workspace_does_no_harm():
    given = draws(cases.Case("cut", 2, 50, CUT), torch.float32, "cpu", 0)
    expected = sampled(given, "triton", 1)
    given["workspace"] = torch.full((workspace_size(2, 50),), torch.nan, dtype=torch.float64)
    found = sampled(given, "triton", 1)
    assert all(torch.equal(found[name], expected[name]) for name in expected)
    given["active"][:] = False
    after = sampled(given, "triton", 1)
    assert all(torch.equal(after[k], given[k]) for k in ("drawn", "seen", "logprobs", "out"))


@pytest.mark.parametrize("number", [0.0, 1 - 2.0**-53])
def test_the_ends_of_the_numbers(number):
    """The first token there is and the last, in order and from the likeliest on."""
    logits = torch.tensor([[-torch.inf, 1.0, 3.0, 2.0, 2.0, -torch.inf]])
    given = {"uniform": torch.tensor([[number]], dtype=torch.float64)}
    given |= {"active": torch.ones(1, dtype=torch.bool), "temperature": torch.ones(1)}
    for cut, expected in (({}, (1, 4)), ({"top_k": torch.tensor([3])}, (2, 4))):
        token = ops.sample(
            logits, drawn=torch.zeros(1, dtype=torch.int64), **given, **cut, impl="triton"
        )
        assert token.item() == expected[number > 0]


def test_what_kernels_cannot_do_is_refused():
    given = draws(cases.CASES[0], torch.float32, "cpu", 0)
    given["logits"] = given["logits"].double()
    with pytest.raises(RuntimeError, match="computes in fp32, and torch.float64"):
        ops.sample(**given, impl="triton")
