"""Which pieces of documents lie in which row, as a function of the seed and the position alone.

Letters: N pieces of all sources, T tokens of a row.

A *piece* is a document, or a stretch of one that is longer than a row. Each source is an endless
sequence of passes over its pieces, each pass in an order of its own; an epoch takes the next
`weight` passes of every source, shuffled together. Its pieces are packed in windows of `WINDOW`
pieces: by best fit, the longest first, into rows of at most T tokens, whose order is shuffled too.
So packing costs little when its turn comes and never waits for a whole epoch, and a position is
found again without what was before it.
"""

from collections.abc import Sequence
from dataclasses import asdict, dataclass
from fractions import Fraction
from math import ceil, floor

import torch
from torch import Tensor

from nemotron_v3.data.order import permutation

WINDOW = 2**16


@dataclass(frozen=True)
class Position:
    """The next row: its epoch, its window there, its number there; and how many rows were before
    it in the run."""

    epoch: int = 0
    window: int = 0
    row: int = 0
    rows: int = 0

    def to_dict(self) -> dict[str, int]:
        return asdict(self)


def best_fit(lengths: Sequence[int], capacity: int) -> list[list[int]]:
    """Rows of at most `capacity` of items with these lengths: each item, the longest first, goes
    into the row that has the least room for it, and else into a new one.

    Returns:
        The numbers of the items of each row; every item is in one of them.
    """
    rows: list[list[int]] = []
    by_room: dict[int, list[int]] = {}
    rooms = 0  # bit n is set where a row has room for exactly n
    for item in sorted(range(len(lengths)), key=lengths.__getitem__, reverse=True):
        length = lengths[item]
        fitting = rooms >> length
        if fitting:
            room = length + (fitting & -fitting).bit_length() - 1
            row = by_room[room].pop()
            if not by_room[room]:
                rooms ^= 1 << room
        else:
            room, row = capacity, len(rows)
            rows.append([])
        rows[row].append(item)
        left = room - length
        if left:
            by_room.setdefault(left, []).append(row)
            rooms |= 1 << left
    return rows


class RowPlan:
    """The endless, or for so many epochs limited, sequence of rows.

    Args:
        lengths: int64 `[N]`, the tokens of each piece, source after source; each at most T.
        counts: the pieces of each source, at least 1.
        weights: passes of each source in an epoch.
        tokens_per_row: T.
        seed: of all orders.
        epochs: after which the sequence ends, or None.
    """

    def __init__(
        self,
        lengths: Tensor,
        counts: Sequence[int],
        weights: Sequence[float],
        tokens_per_row: int,
        seed: int,
        epochs: float | None,
    ):
        self._lengths, self._counts = lengths, tuple(counts)
        # As they were written: 0.1 is a tenth here, and ten epochs of it are one pass.
        self._weights = [Fraction(repr(weight)) for weight in weights]
        self._tokens_per_row, self._seed = tokens_per_row, seed
        self._epochs = None if epochs is None else Fraction(repr(epochs))
        self._epoch: tuple[int, tuple[Tensor, ...]] = (-1, ())
        self._window: tuple[int, int, list[list[int]]] = (-1, -1, [])

    def take(self, position: Position, count: int) -> tuple[list[list[int]], Position]:
        """The pieces of the next `count` rows, fewer at the end, and the position behind them."""
        taken: list[list[int]] = []
        epoch, window, row = position.epoch, position.window, position.row
        behind = position
        while len(taken) < count and not self._is_over(epoch):
            if window >= len(self._windows(epoch)):
                epoch, window, row = epoch + 1, 0, 0
                continue
            part = self._rows(epoch, window)[row : row + count - len(taken)]
            taken += part
            row += len(part)
            behind = Position(epoch, window, row, position.rows + len(taken))
            if row >= len(self._rows(epoch, window)):
                window, row = window + 1, 0
        # Of the last row that was taken: where the sequence ends, an epoch more may follow later.
        return taken, behind

    def check(self, position: Position) -> None:
        """Raise ValueError for a position that `take` gave for no sequence of these rows."""
        here = f"the position is {position.to_dict()}"
        if min(position.to_dict().values()) < 0 or position.rows < position.row:
            raise ValueError(f"{here}: all counts are 0 or more, and rows counts this window's too")
        if position.rows == 0 or self._is_over(position.epoch):
            return
        windows = len(self._windows(position.epoch))
        if position.window >= windows:
            raise ValueError(f"{here}, and the epoch has {windows} windows")
        rows = len(self._rows(position.epoch, position.window))
        if position.row > rows:
            raise ValueError(f"{here}, and the window has {rows} rows")

    def total_rows(self, at_most: int | None = None) -> int | None:
        """Rows of the whole sequence, None where it is endless; packs all of it to know, or as much
        of it as holds `at_most` rows, and gives that number then."""
        if self._epochs is None:
            return None
        rows = 0
        for epoch in range(ceil(self._epochs)):
            for window in self._ordered(epoch):
                if at_most is not None and rows >= at_most:
                    return at_most
                rows += len(self._packed(window))
        return rows if at_most is None else min(rows, at_most)

    def _is_over(self, epoch: int) -> bool:
        return self._epochs is not None and epoch >= self._epochs

    def _windows(self, epoch: int) -> tuple[Tensor, ...]:
        """The pieces of an epoch in their order, window after window."""
        if self._epoch[0] != epoch:
            self._epoch = (epoch, self._ordered(epoch))
        return self._epoch[1]

    def _ordered(self, epoch: int) -> tuple[Tensor, ...]:
        pieces = self._pieces(epoch)
        order = pieces[permutation(len(pieces), self._seed, "epoch", epoch)]
        if self._epochs is not None and epoch + 1 > self._epochs:
            order = order[: ceil((self._epochs - epoch) * len(order))]
        return order.split(WINDOW) if len(order) else ()

    def _pieces(self, epoch: int) -> Tensor:
        """The pieces of an epoch, source after source."""
        found, first = [torch.empty(0, dtype=torch.int64, device="cpu")], 0
        for source, (count, weight) in enumerate(zip(self._counts, self._weights, strict=True)):
            start, end = (floor(number * weight * count) for number in (epoch, epoch + 1))
            while start < end:
                number, place = divmod(start, count)
                taken = min(end - start, count - place)
                order = permutation(count, self._seed, "pass", source, number)
                found.append(order[place : place + taken] + first)
                start += taken
            first += count
        return torch.cat(found)

    def _rows(self, epoch: int, window: int) -> list[list[int]]:
        """The rows of a window in their order."""
        if self._window[:2] != (epoch, window):
            pieces = self._windows(epoch)[window]
            rows = self._packed(pieces)
            order = permutation(len(rows), self._seed, "rows", epoch, window).tolist()
            numbers = pieces.tolist()
            planned = [[numbers[item] for item in rows[row]] for row in order]
            self._window = (epoch, window, planned)
        return self._window[2]

    def _packed(self, pieces: Tensor) -> list[list[int]]:
        return best_fit(self._lengths[pieces].tolist(), self._tokens_per_row)
