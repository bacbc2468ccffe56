"""How a layout is cut into chunks, and chunks into tiles of equal size.

Letters: T packed tokens, D documents, Q tokens of a chunk at most, q tokens of a tile, n tiles of
one size, C chunks in all.

A chunk never crosses a document's border, and it starts at a multiple of Q counted from the
document's own first token, so the arithmetic of a document does not depend on what is packed beside
it. Chunks are computed in tiles of the next power of two, so that a pack of one-token documents
does not pay for whole chunks.
"""

from dataclasses import dataclass
from itertools import accumulate

import torch
from torch import Tensor

from nemotron_v3.layout import SequenceLayout


@dataclass(frozen=True)
class Bucket:
    """The chunks that share one tile size.

    Attributes:
        size: q, tokens of a tile.
        count: n, number of tiles.
        index: int64 `[n, q]`, the packed token at each place (any token where there is none), or
            None where the tiles are the packed tokens in order.
        valid: bool `[n, q]`, which places hold a token; None where all do.
    """

    size: int
    count: int
    index: Tensor | None
    valid: Tensor | None


@dataclass(frozen=True)
class Tiles:
    """The tiles of a layout, and the order in which states pass through its chunks.

    Chunks are numbered as the tiles lie: bucket after bucket. Documents are *ranked* by their
    number of chunks, most first, so that those which still run at step k are the first `active[k]`
    ranks.

    Attributes:
        buckets: the tiles, by size.
        token_order: int64 `[T]`, the place of each packed token in the concatenated tiles; None
            where they are in order.
        rank_order: int64 `[D]`, the document at each rank.
        document_order: int64 `[D]`, the rank of each document.
        active: how many documents have a k-th chunk.
        step_chunks: int64 `[C]`, the chunks in the order of the steps.
        chunk_steps: int64 `[C]`, its inverse.
    """

    buckets: tuple[Bucket, ...]
    token_order: Tensor | None
    rank_order: Tensor
    document_order: Tensor
    active: tuple[int, ...]
    step_chunks: Tensor
    chunk_steps: Tensor

    @classmethod
    def of(cls, layout: SequenceLayout, chunk_size: int) -> "Tiles":
        """The tiles of `layout`, computed once for it and each chunk size."""
        return layout.derived(("ssd", chunk_size), lambda it: _cut(it, chunk_size))


def _cut(layout: SequenceLayout, Q: int) -> Tiles:
    by_size: dict[int, list[tuple[int, int]]] = {}  # size -> (first token, document)
    for document, (start, length) in enumerate(
        zip(layout.offsets[:-1], layout.lengths, strict=True)
    ):
        for first in range(start, start + length, Q):
            tokens = min(Q, start + length - first)
            by_size.setdefault(min(Q, _power_of_two(tokens)), []).append((first, document))
    ends = torch.tensor(layout.offsets[1:])
    buckets, places, chunk_of = [], [], [[] for _ in layout.lengths]
    for size, chunks in sorted(by_size.items(), reverse=True):
        first, document = torch.tensor(chunks).unbind(1)
        index = first[:, None] + torch.arange(size)
        valid = index < ends[document][:, None]
        for number, (_, owner) in enumerate(chunks, start=sum(b.count for b in buckets)):
            chunk_of[owner].append(number)
        buckets.append(_bucket(size, index, valid, layout))
        places.append(torch.where(valid, index, -1).flatten())
    # Within a document the chunks of the full size come first, its shorter last chunk after them.
    return Tiles(tuple(buckets), _token_order(places, layout), *_steps(chunk_of, layout.device))


def _power_of_two(n: int) -> int:
    return 1 << (n - 1).bit_length()


def _bucket(size: int, index: Tensor, valid: Tensor, layout: SequenceLayout) -> Bucket:
    full = bool(valid.all())
    in_order = full and torch.equal(index.flatten(), torch.arange(layout.num_tokens))
    index = index.clamp(max=layout.num_tokens - 1)
    return Bucket(
        size,
        index.shape[0],
        None if in_order else index.to(layout.device),
        None if full else valid.to(layout.device),
    )


def _token_order(places: list[Tensor], layout: SequenceLayout) -> Tensor | None:
    if not places:
        return None
    tokens = torch.cat(places)
    real = tokens >= 0
    order = torch.empty(layout.num_tokens, dtype=torch.int64)
    order[tokens[real]] = real.nonzero().flatten()
    return None if torch.equal(order, torch.arange(tokens.numel())) else order.to(layout.device)


def _steps(
    chunk_of: list[list[int]], device: torch.device
) -> tuple[Tensor, Tensor, tuple[int, ...], Tensor, Tensor]:
    rank_order = torch.tensor(sorted(range(len(chunk_of)), key=lambda d: -len(chunk_of[d])))
    counts = [len(chunks) for chunks in chunk_of]
    active = tuple(sum(n > k for n in counts) for k in range(max(counts)))
    ranked = [chunk_of[document] for document in rank_order.tolist()]
    step_chunks = torch.tensor(
        [ranked[rank][k] for k, n in enumerate(active) for rank in range(n)], dtype=torch.int64
    )
    return (
        rank_order.to(device),
        rank_order.argsort().to(device),
        active,
        step_chunks.to(device),
        step_chunks.argsort().to(device),
    )


def step_starts(active: tuple[int, ...]) -> tuple[int, ...]:
    """Where each step's chunks start among `step_chunks`."""
    return (0, *accumulate(active))
