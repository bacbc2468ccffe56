"""Which tokens of a batch each process of a context-parallel group has. All of it is known on the
host, of the lengths alone: no device is read, and processes need not ask each other.

Letters: R processes, T packed tokens of the whole batch.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import pairwise
from typing import Literal

import torch
from torch import Tensor

from nemotron_v3.layout import SequenceLayout
from nemotron_v3.layout.modes import on_device, once

Order = Literal["contiguous", "zigzag", "auto"]
ORDERS = ("contiguous", "zigzag", "auto")
# Pairs of tokens that the slowest process may attend to above the even share, for each of its
# tokens, before two segments a process pay: about a tenth of a step of the released models.
WORTH = 8192


@dataclass(frozen=True)
class Share:
    """A segment of the packed tokens that one process has.

    Attributes:
        start, end: of its tokens; it may have none.
        rank: of the process in the group.
        before: tokens of the document it begins in that lie before it.
        has_border: whether a document begins strictly inside.
    """

    start: int
    end: int
    rank: int
    before: int
    has_border: bool

    @property
    def enters(self) -> bool:
        """Whether it begins inside a document."""
        return self.before > 0


@dataclass(frozen=True)
class Shares:
    """All segments in the order of the sequence, and what one process has.

    Attributes:
        layout: of the whole batch, packed.
        all: every segment.
        own: numbers of this process's segments in `all`, in the order of its tokens.
        size, rank: R, and this process.
        order: how the segments go to the processes.
    """

    layout: SequenceLayout
    all: tuple[Share, ...]
    own: tuple[int, ...]
    size: int
    rank: int
    order: Order

    @classmethod
    def of(cls, layout: SequenceLayout, size: int, rank: int, order: Order) -> "Shares":
        """The shares of a layout of packed tokens."""
        chosen: Order = order if order != "auto" else _cheapest(layout, size)
        bounds = _bounds(layout.num_tokens, size, chosen)
        ranks = [*range(size)] if chosen == "contiguous" else [*range(size), *reversed(range(size))]
        return cls.at(layout, bounds, ranks, rank, chosen)

    @classmethod
    def at(
        cls,
        layout: SequenceLayout,
        bounds: Sequence[int],
        ranks: Sequence[int],
        rank: int,
        order: Order = "zigzag",
    ) -> "Shares":
        """The shares where somebody else has cut the tokens.

        Args:
            layout: of the whole batch, packed.
            bounds: where the segments begin among its tokens, and where the last one ends.
            ranks: of the process that has each segment; all have as many.
            rank: of this process.
            order: what the cuts are called.
        """
        starts = sorted({s for s, n in zip(layout.offsets, layout.lengths, strict=False) if n})
        found = []
        for (start, end), of in zip(pairwise(bounds), ranks, strict=True):
            first = max((s for s in starts if s <= start), default=start)
            inside = any(start < s < end for s in starts)
            # At the very end of all tokens no document goes on.
            before = start - first if start < layout.num_tokens else 0
            found.append(Share(start, end, of, before, inside))
        own = tuple(j for j, share in enumerate(found) if share.rank == rank)
        return cls(layout, tuple(found), own, max(ranks) + 1, rank, order)

    @once
    def cuts(self) -> bool:
        """Whether any document lies in more than one segment."""
        return any(share.enters for share in self.all)

    @once
    def pieces(self) -> tuple[tuple[int, ...], ...]:
        """The lengths of the pieces of documents in each own segment; at least one piece each."""
        starts = [s for s, n in zip(self.layout.offsets, self.layout.lengths, strict=False) if n]
        found = []
        for j in self.own:
            start, end = self.all[j].start, self.all[j].end
            cuts = [start, *(s for s in starts if start < s < end), end]
            found.append(tuple(b - a for a, b in pairwise(cuts)))
        return tuple(found)

    @once
    def local(self) -> SequenceLayout:
        """The pieces of this process's segments, as documents."""
        lengths = [n for pieces in self.pieces for n in pieces]
        return SequenceLayout.from_lengths(lengths, self.layout.device)

    @once
    def index(self) -> Tensor:
        """int64: the place of each own token among the packed ones of the batch."""
        runs = [torch.arange(self.all[j].start, self.all[j].end, device="cpu") for j in self.own]
        return on_device(torch.cat(runs), self.layout.device)

    def tokens_of(self, rank: int) -> int:
        return sum(share.end - share.start for share in self.all if share.rank == rank)

    def place(self, position: int) -> tuple[int, int]:
        """Of a packed token: its segment, and its place among that process's tokens."""
        for j, share in enumerate(self.all):
            if share.start <= position < share.end:
                earlier = [s for s in self.all[:j] if s.rank == share.rank]
                return j, sum(s.end - s.start for s in earlier) + position - share.start
        raise IndexError(f"token {position} of {self.layout.num_tokens}")


def _bounds(tokens: int, size: int, order: str) -> list[int]:
    parts = size if order == "contiguous" else 2 * size
    return [tokens * i // parts for i in range(parts + 1)]


def _cheapest(layout: SequenceLayout, size: int) -> Order:
    """Contiguous, unless its slowest process has many more pairs of tokens to attend to."""
    worst = {order: _most_pairs(layout, size, order) for order in ("contiguous", "zigzag")}
    tokens = max(1, layout.num_tokens // size)
    return "zigzag" if worst["contiguous"] - worst["zigzag"] > WORTH * tokens else "contiguous"


def _most_pairs(layout: SequenceLayout, size: int, order: str) -> int:
    bounds = _bounds(layout.num_tokens, size, order)
    pairs = [0] * (len(bounds) - 1)
    part = 0
    for start, length in zip(layout.offsets, layout.lengths, strict=False):
        end, at = start + length, start
        while at < end:
            while bounds[part + 1] <= at:
                part += 1
            stop = min(end, bounds[part + 1])
            pairs[part] += _pairs(stop - start) - _pairs(at - start)
            at = stop
    if order == "zigzag":
        pairs = [pairs[r] + pairs[-1 - r] for r in range(size)]
    return max(pairs)


def _pairs(tokens: int) -> int:
    return tokens * (tokens + 1) // 2


def check_order(order: Sequence[str] | str) -> None:
    """Raises ValueError for a layout of another name."""
    if order not in ORDERS:
        raise ValueError(f"the context-parallel layout is {order!r}: give one of {ORDERS}")
