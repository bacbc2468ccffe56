"""What token sequences begin with in common, as a forest of stretches.

A stretch that several sequences share stands in it once. A sequence is the stretches from a root to
its leaf, one behind the other.
"""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any

LEAST_SAVED = 32
"""Tokens that a shared stretch has to save: below it, feeding them again costs less than a copy of
the states behind it."""


@dataclass(eq=False)
class Stretch:
    """Tokens that stand behind those of `parent`.

    Attributes:
        start: tokens before it, from the root on.
        tokens: its own; none at a leaf whose sequence ends where others go on.
        parent: what comes before it, None at a root.
        children: what comes behind it.
        members: at a leaf, the numbers of the sequences that end with it; equal ones share it.
        waiting: children that still need the states behind it.
        state: whatever was computed behind it.
    """

    start: int
    tokens: list[int]
    parent: "Stretch | None"
    children: "list[Stretch]" = field(default_factory=list)
    members: list[int] = field(default_factory=list)
    waiting: int = 0
    state: Any = None

    @property
    def end(self) -> int:
        return self.start + len(self.tokens)

    def through(self) -> Iterator[int]:
        """The numbers of all sequences that it is a part of."""
        pending = [self]
        while pending:
            each = pending.pop()
            yield from each.members
            pending += each.children


def shared_prefixes(
    sequences: Sequence[Sequence[int]], least: int | None = LEAST_SAVED
) -> list[Stretch]:
    """The roots of the forest of some sequences, in the order of their tokens.

    Args:
        sequences: token ids.
        least: tokens that a stretch has to save to be shared; None shares nothing, equal sequences
            apart.
    """
    same: dict[tuple[int, ...], list[int]] = {}
    for number, sequence in enumerate(sequences):
        same.setdefault(tuple(sequence), []).append(number)
    keys = sorted(same)
    roots: list[Stretch] = []
    # Sequences from one to another in sorted order share so many tokens, below a stretch.
    pending: list[tuple[int, int, Stretch | None]] = [(0, len(keys), None)]
    while pending:
        first, last, parent = pending.pop()
        if first == last:
            continue
        start = parent.end if parent is not None else 0
        below = parent.children if parent is not None else roots
        if last - first == 1 or least is None:
            for key in keys[first:last]:
                below.append(Stretch(start, list(key[start:]), parent, members=same[key]))
            continue
        shared = _common(keys[first], keys[last - 1])
        groups = list(_by_token(keys, first, last, shared))
        if shared > start and (shared - start) * (len(groups) - 1) >= least:
            stretch = Stretch(start, list(keys[first][start:shared]), parent)
            below.append(stretch)
            parent = stretch
        pending += [(a, b, parent) for a, b in groups]
    return roots


def _common(a: Sequence[int], b: Sequence[int]) -> int:
    """How many tokens two sequences begin with in common."""
    length = min(len(a), len(b))
    return next((place for place in range(length) if a[place] != b[place]), length)


def _by_token(
    keys: Sequence[Sequence[int]], first: int, last: int, place: int
) -> Iterator[tuple[int, int]]:
    """The stretches of sorted sequences that have the same token at a place; the one that ends
    there stands alone."""
    begin = first
    for number in range(first + 1, last + 1):
        if number == last or keys[number][place] != _token(keys[begin], place):
            yield begin, number
            begin = number


def _token(key: Sequence[int], place: int) -> int:
    return key[place] if place < len(key) else -1
