"""Lengths as real data brings them: drawn anew in every step."""

import random
from collections.abc import Callable

Draw = Callable[[random.Random], list[int]]


def documents(total: int, count: int) -> Draw:
    """`count` documents of `total` tokens together, cut at random."""

    def draw(source: random.Random) -> list[int]:
        cuts = [0, *sorted(source.sample(range(1, total), count - 1)), total]
        return [end - start for start, end in zip(cuts, cuts[1:], strict=False)]

    return draw


def rows(count: int, longest: int, total: int) -> Draw:
    """Rows of a padded batch, the first one full, of about `total` tokens together."""

    def draw(source: random.Random) -> list[int]:
        mean = (total - longest) / (count - 1)
        low, high = int(0.5 * mean), min(longest, int(1.5 * mean))
        return [longest, *(source.randint(low, high) for _ in range(count - 1))]

    return draw


def one(low: int, high: int) -> Draw:
    """One document of `low` to `high` tokens."""
    return lambda source: [source.randint(low, high)]


def same(*lengths: int) -> Draw:
    return lambda source: list(lengths)
