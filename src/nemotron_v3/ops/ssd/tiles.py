"""How a layout is cut into tiles, tiles into slabs, and where the state around each tile is kept.

Letters: T packed tokens, D documents, Q tokens of a chunk at most, q tokens of a tile, n tiles of a
slab, C tiles in all.

A tile never crosses a document's border, and it starts at a multiple of Q counted from the
document's own first token, so the arithmetic of a document does not depend on what is packed beside
it. Tiles are of the next power of two of their tokens, so that a pack of one-token documents does
not pay for whole chunks. A slab is what is worked on at a time: tiles of one size, few enough for
the arrays of all pairs of their tokens to stay in a cache.

The state of a document with c tiles passes through c + 1 rows of one array: the initial state, then
the state after each tile. The state before tile k is row k of its document, the one after it row
k + 1.
"""

from collections.abc import Iterator
from dataclasses import dataclass
from itertools import accumulate

import torch
from torch import Tensor

from nemotron_v3.layout import SequenceLayout

# Rows of an array: a slice where they are evenly spaced, for then taking them is a view.
Rows = slice | Tensor


@dataclass(frozen=True)
class Slab:
    """`count` tiles of `size` places each.

    Attributes:
        tiles: their numbers, consecutive.
        tokens: the packed token at each of the n * q places; where a place holds none, the last
            token of the tile's own document.
        valid: bool `[n, q]`, which places hold a token; None where all do.
        places: int64, the places that hold a token; None where all do.
        before: the state row before each tile. after: the one after it.
    """

    size: int
    count: int
    tiles: slice
    tokens: Rows
    valid: Tensor | None
    places: Tensor | None
    before: Rows
    after: Rows

    def take(self, stream: Tensor) -> Tensor:
        """`[T, ...]` -> `[n, q, ...]`, a view where the slab's tokens lie in a row."""
        return take(stream, self.tokens).unflatten(0, (self.count, self.size))

    def target(self, stream: Tensor, dtype: torch.dtype) -> Tensor:
        """Where to write the slab's part `[n, q, ...]` of a stream `[T, ...]`; see `put`."""
        if isinstance(self.tokens, slice) and stream.dtype == dtype:
            return self.take(stream)
        return stream.new_empty(self.count, self.size, *stream.shape[1:], dtype=dtype)

    def put(self, stream: Tensor, part: Tensor) -> None:
        """Store a part that `target` gave, once it is written."""
        if isinstance(self.tokens, slice):
            if part.dtype != stream.dtype:
                self.take(stream).copy_(part)
        elif self.places is None:
            stream.index_copy_(0, self.tokens, part.flatten(0, 1).to(stream.dtype))
        else:
            real = part.flatten(0, 1).index_select(0, self.places)
            stream.index_copy_(0, self.tokens[self.places], real.to(stream.dtype))


def take(array: Tensor, rows: Rows) -> Tensor:
    return array[rows] if isinstance(rows, slice) else array.index_select(0, rows)


@dataclass(frozen=True)
class Tiles:
    """The tiles of a layout, and how states pass through them.

    Attributes:
        slabs: all tiles, in slabs.
        count: C.
        state_rows: C + D.
        steps: step k of every document that has a k-th tile: the tiles, the state rows before them
            and after them.
        initial: the state row of each document's initial state. final: that of its final one.
    """

    slabs: tuple[Slab, ...]
    count: int
    state_rows: int
    steps: tuple[tuple[Rows, Rows, Rows], ...]
    initial: Rows
    final: Rows

    @classmethod
    def of(cls, layout: SequenceLayout, tile_size: int, slab_tokens: int) -> "Tiles":
        """The tiles of `layout`, computed once for it and each size."""
        return layout.derived(
            ("ssd", tile_size, slab_tokens), lambda it: _cut(it, tile_size, slab_tokens)
        )


@dataclass(frozen=True)
class _Tile:
    size: int
    document: int
    step: int  # the how-manieth of its document
    first: int
    tokens: int


def _cut(layout: SequenceLayout, Q: int, slab_tokens: int) -> Tiles:
    starts = layout.offsets[:-1]
    tiles = [
        _Tile(min(Q, _power_of_two(tokens)), document, step, start + step * Q, tokens)
        for document, (start, length) in enumerate(zip(starts, layout.lengths, strict=True))
        for step in range(-(-length // Q))
        if (tokens := min(Q, length - step * Q))
    ]
    tiles.sort(key=lambda tile: -tile.size)  # stable: a document's tiles stay in order
    per_document = [-(-length // Q) for length in layout.lengths]
    initial = list(accumulate([0, *(c + 1 for c in per_document)]))[:-1]
    before = [initial[tile.document] + tile.step for tile in tiles]
    device = layout.device
    steps: list[list[int]] = [[] for _ in range(max(per_document))]
    for number, tile in enumerate(tiles):
        steps[tile.step].append(number)
    return Tiles(
        tuple(_slabs(tiles, before, slab_tokens, device)),
        len(tiles),
        len(tiles) + layout.num_documents,
        tuple(
            (_rows(step, device), _rows(rows, device), _rows([row + 1 for row in rows], device))
            for step, rows in ((step, [before[number] for number in step]) for step in steps)
        ),
        _rows(initial, device),
        _rows([row + c for row, c in zip(initial, per_document, strict=True)], device),
    )


def _slabs(
    tiles: list[_Tile], before: list[int], slab_tokens: int, device: torch.device
) -> Iterator[Slab]:
    first = 0
    while first < len(tiles):
        size = tiles[first].size
        end = first
        while (
            end < len(tiles)
            and tiles[end].size == size
            and (end == first or (end - first + 1) * size <= slab_tokens)
        ):
            end += 1
        yield _slab(size, slice(first, end), tiles[first:end], before[first:end], device)
        first = end


def _slab(
    size: int, numbers: slice, tiles: list[_Tile], before: list[int], device: torch.device
) -> Slab:
    place = torch.arange(size, device="cpu")
    sizes = [(tile.first, tile.tokens) for tile in tiles]
    start, tokens = torch.tensor(sizes, device="cpu").unbind(1)
    index = (start[:, None] + place.clamp(max=tokens[:, None] - 1)).flatten()
    valid = place < tokens[:, None]
    full = bool(valid.all())
    return Slab(
        size,
        len(tiles),
        numbers,
        _rows(index.tolist(), device),
        None if full else valid.to(device),
        None if full else valid.flatten().nonzero().flatten().to(device),
        _rows(before, device),
        _rows([row + 1 for row in before], device),
    )


def _rows(numbers: list[int], device: torch.device) -> Rows:
    """A slice where the numbers are evenly spaced and rise, else a tensor."""
    if not numbers:
        return slice(0, 0)
    step = numbers[1] - numbers[0] if len(numbers) > 1 else 1
    if step > 0 and numbers == list(range(numbers[0], numbers[-1] + 1, step)):
        return slice(numbers[0], numbers[-1] + 1, step)
    return torch.tensor(numbers, dtype=torch.int64, device=device)


def _power_of_two(n: int) -> int:
    return 1 << (n - 1).bit_length()
