"""What is left of a long curve: all that is seen of it."""

import math
import random

import pytest

from nemotron_v3.pages.thin import smooth, smoothing_steps, thin


def test_few_points_all_stay():
    assert thin([3.0, math.nan, 1.0], 10) == [0, 1, 2]
    assert thin([], 10) == []


@pytest.mark.parametrize("count", [101, 1000, 54_321])
def test_ends_spikes_and_gaps_of_every_stretch_survive(count):
    drawn = random.Random(count)
    values = [drawn.gauss(0, 1) for _ in range(count)]
    high, low, gap = (drawn.randrange(count) for _ in range(3))
    values[high], values[low], values[gap] = 50.0, -50.0, math.nan
    kept = thin(values, 100)
    assert kept == sorted(set(kept)) and len(kept) <= 100 + 3
    assert {0, count - 1, high, low, gap} <= set(kept)
    for stretch in range(50):
        part = range(stretch * count // 50, (stretch + 1) * count // 50)
        finite = [values[i] for i in part if i != gap]
        left = [values[i] for i in kept if i in part and i != gap]
        assert (min(left), max(left)) == (min(finite), max(finite))


def test_smoothing_is_the_weighted_mean_of_what_came_before():
    values = [4.0, 1.0, math.nan, 2.0, 8.0]
    told = smooth(values, 4.0)
    for i, got in enumerate(told):
        finite = [j for j in range(i + 1) if values[j] == values[j]]
        weights = [0.75 ** sum(j < k for k in finite) for j in finite]
        mean = sum(w * values[j] for w, j in zip(weights, finite, strict=True)) / sum(weights)
        assert got == pytest.approx(mean, rel=1e-12)
    assert math.isnan(smooth([math.nan], 3)[0])
    assert smooth([5.0] * 9, smoothing_steps(9)) == pytest.approx([5.0] * 9)


def test_a_long_run_is_smoothed_over_more_steps():
    assert [smoothing_steps(n) for n in (1, 10, 100, 600, 60_000)] == [2, 2, 10, 10, 1000]
