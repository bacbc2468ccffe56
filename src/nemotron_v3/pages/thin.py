"""Fewer points that look the same: what a curve shows, at a bounded size."""

from collections.abc import Sequence
from math import isfinite

# Points of a line that go into a page. The page thins once more to what its width can show, and
# anew when it is zoomed.
MOST_POINTS = 8000
# The weight of a smoothed curve falls to 1/e over this part of the run.
SMOOTHED_PART = 1 / 60


def thin(values: Sequence[float], most: int = MOST_POINTS) -> list[int]:
    """Indices of the points to keep, at most about `most`, in order.

    All of them where they are few. Else the values are cut into stretches, and each keeps its least
    and its greatest, so that no spike is lost, and its first that is not finite; the first and the
    last value of all stay.
    """
    count = len(values)
    if count <= most:
        return list(range(count))
    stretches = most // 2
    kept = {0, count - 1}
    for stretch in range(stretches):
        start, stop = stretch * count // stretches, (stretch + 1) * count // stretches
        part = values[start:stop]
        finite = part if all(map(isfinite, part)) else [x for x in part if isfinite(x)]
        if len(finite) < len(part):
            kept.add(start + next(i for i, x in enumerate(part) if not isfinite(x)))
        if finite:
            kept |= {start + part.index(min(finite)), start + part.index(max(finite))}
    return sorted(kept)


def smooth(values: Sequence[float], steps: float) -> list[float]:
    """The exponential average over about so many values, corrected for its start; what is not
    finite counts for nothing."""
    keep = max(0.0, 1 - 1 / max(steps, 1.0))
    mean = weight = 0.0
    smoothed = []
    for value in values:
        if isfinite(value):
            mean = keep * mean + (1 - keep) * value
            weight = keep * weight + (1 - keep)
        smoothed.append(mean / weight if weight else float("nan"))
    return smoothed


def smoothing_steps(count: int) -> int:
    """Over how many of `count` values a curve is smoothed."""
    return max(2, round(max(count * SMOOTHED_PART, min(count / 5, 10))))
