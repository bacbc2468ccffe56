"""How a layout is cut into tiles, tiles into slabs, and how states pass through them.

Letters: T packed tokens, n_docs documents, Q tokens of a chunk at most, q tokens of a tile, n tiles
of a slab.

A tile never crosses a document's border, and it starts at a multiple of Q counted from the
document's own first token, so the arithmetic of a document does not depend on what is packed beside
it. Tiles are of the next power of two of their tokens, so that a pack of one-token documents does
not pay for whole chunks. A slab is what is worked on at a time: tiles of one size, few enough for
the arrays of all pairs of their tokens to stay in a cache. A run is all tiles of one size.
"""

from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor

from nemotron_v3.layout import SequenceLayout
from nemotron_v3.ops.common.host import power_of_two

# Rows of an array: a slice where they are evenly spaced, for then taking them is a view.
Rows = slice | Tensor


@dataclass(frozen=True)
class Slab:
    """`count` tiles of `size` places each.

    Attributes:
        tokens: the packed token at each of the n * q places; where a place holds none, the last
            token of the tile's own document.
        valid: bool `[n, q]`, which places hold a token; None where all do.
        places: int64, the places that hold a token; None where all do.
        steps: the slab's tiles in the order in which states pass through them, those of different
            documents together: which of its n tiles, and their documents.
    """

    size: int
    count: int
    tokens: Rows
    valid: Tensor | None
    places: Tensor | None
    steps: tuple[tuple[Rows, Rows], ...]

    def take(self, stream: Tensor) -> Tensor:
        """`[T, ...]` -> `[n, q, ...]`, a view where the slab's tokens lie in a row."""
        return take(stream, self.tokens).view(self.count, self.size, *stream.shape[1:])

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
class Run:
    """All tiles of one size, at once and in slabs of which each has its range of the tiles."""

    whole: Slab
    slabs: tuple[tuple[slice, Slab], ...]


@dataclass(frozen=True)
class Tiles:
    """The tiles of a layout.

    Attributes:
        runs: all tiles; those of a document in the order of its tokens.
        documents: D.
    """

    runs: tuple[Run, ...]
    documents: int

    @classmethod
    def of(cls, layout: SequenceLayout, tile_size: int, slab_tokens: int) -> "Tiles":
        """The tiles of `layout`, computed once for it and each size."""
        return layout.derived(
            ("ssd", tile_size, slab_tokens), lambda it: _cut(it, tile_size, slab_tokens)
        )


class _Tile(NamedTuple):
    document: int
    first: int
    tokens: int


def _cut(layout: SequenceLayout, Q: int, slab_tokens: int) -> Tiles:
    by_size: dict[int, list[_Tile]] = {}  # a document's tiles in the order of its tokens
    for document, length in enumerate(layout.lengths):
        start = layout.offsets[document]
        for first in range(start, start + length, Q):
            tokens = min(Q, start + length - first)
            size = min(Q, power_of_two(tokens))
            by_size.setdefault(size, []).append(_Tile(document, first, tokens))
    runs = [
        _run(size, by_size[size], slab_tokens, layout.device)
        for size in sorted(by_size, reverse=True)
    ]
    return Tiles(tuple(runs), len(layout.lengths))


def _run(size: int, tiles: list[_Tile], slab_tokens: int, device: torch.device) -> Run:
    whole, step = _slab(size, tiles, device), max(1, slab_tokens // size)
    if len(tiles) <= step:
        return Run(whole, ((slice(0, len(tiles)), whole),))
    parts = [slice(i, min(i + step, len(tiles))) for i in range(0, len(tiles), step)]
    return Run(whole, tuple([(part, _slab(size, tiles[part], device)) for part in parts]))


def _slab(size: int, tiles: list[_Tile], device: torch.device) -> Slab:
    place = torch.arange(size, device="cpu")
    sizes = [(tile.first, tile.tokens) for tile in tiles]
    start, tokens = torch.tensor(sizes, device="cpu").unbind(1)
    index = (start[:, None] + place.clamp(max=tokens[:, None] - 1)).flatten()
    valid = place < tokens[:, None]
    full = bool(valid.all())
    return Slab(
        size,
        len(tiles),
        _rows(index.tolist(), device),
        None if full else valid.to(device),
        None if full else valid.flatten().nonzero().flatten().to(device),
        tuple(_steps(tiles, device)),
    )


def _steps(tiles: list[_Tile], device: torch.device) -> Iterator[tuple[Rows, Rows]]:
    seen: Counter[int] = Counter()
    steps: list[list[int]] = []
    for number, tile in enumerate(tiles):
        if seen[tile.document] == len(steps):
            steps.append([])
        steps[seen[tile.document]].append(number)
        seen[tile.document] += 1
    for step in steps:
        yield _rows(step, device), _rows([tiles[number].document for number in step], device)


def _rows(numbers: list[int], device: torch.device) -> Rows:
    """A slice where the numbers are evenly spaced and rise, else a tensor."""
    if not numbers:
        return slice(0, 0)
    step = numbers[1] - numbers[0] if len(numbers) > 1 else 1
    if step > 0 and numbers == list(range(numbers[0], numbers[-1] + 1, step)):
        return slice(numbers[0], numbers[-1] + 1, step)
    return torch.tensor(numbers, dtype=torch.int64, device=device)
