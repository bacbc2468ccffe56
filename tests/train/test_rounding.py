"""Stochastic rounding: fair, and a function of key and element alone."""

import math

import pytest
import torch

from nemotron_v3.train.rounding import round_stochastically_, rounding_key


def rounded(value: torch.Tensor, key: int = 1, start: int = 0) -> torch.Tensor:
    target = torch.empty(value.shape, dtype=torch.bfloat16)
    round_stochastically_(target, value, key, start)
    return target


@pytest.mark.parametrize("x", [1.0, -3.5, 0.0, -0.0, 2.0**-130, 3e38])
def test_what_bfloat16_holds_stays(x):
    value = torch.full((1000,), x).bfloat16()
    out = rounded(value.float())
    assert torch.equal(out.view(torch.int16), value.view(torch.int16))


@pytest.mark.parametrize("x", [1.001, -1.003, 3.14159, -2e-30, 1e20])
def test_either_neighbour_comes_as_often_as_it_is_near(x):
    n = 2**18
    value = torch.full((n,), x)
    out = rounded(value).double()
    down, up = sorted(set(out.tolist()))
    part = (value[0].double().item() - down) / (up - down)
    # Within five standard deviations of n draws.
    allowed = 5 * math.sqrt(part * (1 - part) / n)
    assert abs((out == up).double().mean().item() - part) <= allowed


def test_the_draws_of_tensors_steps_and_neighbours_know_nothing_of_each_other():
    n = 2**16
    value = torch.full((n,), 1 + 2.0**-8)  # half way between two of bfloat16
    keys = [rounding_key(name, step) for name in ("a", "b") for step in (1, 2)]
    ups = [(rounded(value, key).double() > 1.0).double() for key in keys]
    assert len(set(keys)) == 4
    for i, first in enumerate(ups):
        shifted = torch.roll(first, 1)
        for other in [*ups[:i], shifted]:
            together = ((first - 0.5) * (other - 0.5)).mean().item()
            assert abs(together) < 5 * 0.25 / math.sqrt(n)


@pytest.mark.parametrize("start", [0, 2**31 - 500, 2**32 - 500])
def test_parts_are_rounded_as_the_whole_is(start):
    value = torch.randn(1000)
    whole = rounded(value, 7, start)
    parts = [rounded(value[:400], 7, start), rounded(value[400:], 7, start + 400)]
    assert torch.equal(torch.cat(parts), whole)
    assert not torch.equal(rounded(value, 8, start), whole)


def test_a_small_update_is_kept_on_average():
    """1000 updates of a hundredth of the last bit: to the nearest, all of them are lost."""
    n, step = 4096, 2.0**-7 / 100
    weight, nearest = (torch.ones(n, dtype=torch.bfloat16) for _ in range(2))
    for i in range(1000):
        round_stochastically_(weight, weight.float() + step, rounding_key("w", i))
        nearest = (nearest.float() + step).bfloat16()
    assert nearest.eq(1).all()
    assert weight.double().mean().item() == pytest.approx(1 + 1000 * step, rel=2e-3)
