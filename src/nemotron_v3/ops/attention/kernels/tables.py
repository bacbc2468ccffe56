"""How the kernels cut documents into tiles.

Letters: T packed tokens, n_docs documents, H query heads, J key/value heads, P head width, M
queries and N keys of a tile.

A tile starts at a multiple of M (or N) counted from its document's first token, and sizes depend on
the dtype and the widths alone. So what a document's results round to does not depend on what is
packed beside it.
"""

import functools
from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor

from nemotron_v3.layout import SequenceLayout
from nemotron_v3.ops.common.host import interpreted, power_of_two

WIDEST = 256  # head width


class Tile(NamedTuple):
    """One kernel's tiles.

    Attributes:
        m, n: queries and keys.
        stages: depth of the software pipeline.
        warps: of a program.
    """

    m: int
    n: int
    stages: int
    warps: int


@dataclass(frozen=True)
class Blocks:
    """Sizes of one call.

    Attributes:
        p: head width, as the power of two that holds it.
        heads: query heads that a program of dk and dv takes, a divisor of a group's.
        precision: of `tl.dot` on fp32 operands.
        forward, dq, dkv: of these kernels. `forward.m` and `dq.m` are the same.
    """

    p: int
    heads: int
    precision: str
    forward: Tile
    dq: Tile
    dkv: Tile

    @classmethod
    def of(cls, dtype: torch.dtype, head_dim: int, heads_of_group: int) -> "Blocks":
        if torch.compiler.is_compiling():  # which warns of caches
            return cls._of(dtype, head_dim, heads_of_group)
        return _known(dtype, head_dim, heads_of_group)

    @classmethod
    def _of(cls, dtype: torch.dtype, head_dim: int, heads_of_group: int) -> "Blocks":
        # Below 64 columns Triton 3.6 computes products wrongly in loops without a pipeline.
        least = 16 if dtype == torch.float32 else 64
        p = max(least, power_of_two(head_dim))
        heads = max(h for h in range(1, 5) if heads_of_group % h == 0)
        if interpreted():
            return cls(p, heads, "ieee", *[Tile(32, 32, 1, 4)] * 3)
        if dtype == torch.float32:
            return cls(p, heads, "ieee", *[Tile(32, 32 if p <= 128 else 16, 1, 8)] * 3)
        if p > 128:
            return cls(
                *(p, heads, "tf32"),
                forward=Tile(64, 64, 2, 8),
                dq=Tile(64, 32, 2, 8),
                dkv=Tile(32, 64, 2, 8),
            )
        return cls(
            *(p, heads, "tf32"),
            forward=Tile(64, 64, 3, 4),
            dq=Tile(64, 64, 2, 4),
            dkv=Tile(64, 64, 2, 4),
        )


_known = functools.cache(Blocks._of)


class Tables(NamedTuple):
    """int64, on the device: the document and the first query (or key) of each tile.

    The tiles with most work come first, so that the last programs to run are short ones.
    """

    document: Tensor
    first: Tensor
    key_document: Tensor
    key_first: Tensor


def tile_tables(
    layout: SequenceLayout, blocks: Blocks, starts: tuple[int, ...] = (), held: Tensor | None = None
) -> Tables:
    """The tiles of a layout's queries, and of the keys they see.

    Args:
        starts: keys that each document holds before its own, on the host; none by default.
        held: int64 `[n_docs]`, the same on the device.
    """
    M, N = blocks.forward.m, blocks.dkv.n

    def build(layout: SequenceLayout) -> Tables:
        lengths = layout.cu_seqlens.diff()
        # Nobody reads the keys of a row that gets no token.
        keys = lengths if held is None else (lengths + held).where(lengths > 0, 0)
        before = starts or (0,) * layout.num_documents
        of_queries = _tiles(lengths, M, sum(-(-n // M) for n in layout.lengths))
        ends = zip(before, layout.lengths, strict=True)
        of_keys = _tiles(keys, N, sum(-(-(start + n) // N) for start, n in ends if n))
        return Tables(*_by_work(*of_queries, held), *_by_work(*of_keys, keys, after=True))

    return layout.derived(("attention tiles", M, N, starts), build)


def _tiles(lengths: Tensor, size: int, count: int) -> tuple[Tensor, Tensor]:
    """Document and first token of each of `count` tiles, in order."""
    per_document = (lengths + (size - 1)).div(size, rounding_mode="floor")
    documents = torch.arange(lengths.shape[0], device=lengths.device)
    owner = documents.repeat_interleave(per_document, output_size=count)
    before = per_document.cumsum(0) - per_document
    within = torch.arange(count, device=lengths.device) - before.index_select(0, owner)
    return owner, within * size


def _by_work(
    owner: Tensor, first: Tensor, of_document: Tensor | None, after: bool = False
) -> tuple[Tensor, Tensor]:
    """Tiles of queries by the keys before them, tiles of keys by the queries after them."""
    work = first
    if of_document is not None:
        work = of_document.index_select(0, owner) + (-first if after else first)
    order = work.argsort(descending=True, stable=True)
    return owner.index_select(0, order), first.index_select(0, order)
