"""How the kernels cut a layout into chunks, and which blocks they use for a shape.

Letters: T packed tokens, n_docs documents, n_chunks chunks, Q tokens of a chunk. A chunk starts at
a multiple of Q counted from its document's first token and ends with the document, so what a
document's results round to does not depend on what is packed beside it. Q is the kernels' own: the
model's `chunk_size` changes no mathematics.
"""

import functools
from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor

from nemotron_v3.layout import SequenceLayout
from nemotron_v3.ops.common.host import power_of_two


class Sizes(NamedTuple):
    """What the kernels are compiled for, beside strides and the depth of pipelines.

    Attributes:
        P, N: head width and state.
        HEADS_OF_GROUP: heads that share B and C.
        HEADS: heads that a program of the scan or of dx takes, a divisor of a group's.
        TILE, Q: tokens of a tile and of a chunk, which is two tiles.
        BLOCK_P, BLOCK_N: P and N, as the powers of two that hold them.
        PRECISION: of `tl.dot` on fp32 operands.
    """

    P: int
    N: int
    HEADS_OF_GROUP: int
    HEADS: int
    TILE: int
    Q: int
    BLOCK_P: int
    BLOCK_N: int
    PRECISION: str


class Strides(NamedTuple):
    """From token to token, of the tensors that a kernel takes."""

    x: int
    B: int
    C: int = 0
    y: int = 0
    dy: int = 0
    dx: int = 0
    dB: int = 0
    dC: int = 0


class Tuning(NamedTuple):
    """How a kernel that loops over heads is compiled.

    Attributes:
        stages: depth of its software pipeline. A deeper one needs more shared memory, and fewer
            programs then share a multiprocessor.
        warps: of a program.
    """

    stages: int = 1
    warps: int = 4


class Passing(NamedTuple):
    """How the passing of states, whose pipeline is over chunks, is cut and compiled.

    Attributes:
        slice: columns of the state that one program carries.
        stages, warps: as of `Tuning`.
    """

    slice: int
    stages: int = 1
    warps: int = 4


class GradientStages(NamedTuple):
    """Depths of the pipelines of three kernels in one launch."""

    dx: int
    dB: int
    dC: int


@dataclass(frozen=True)
class Blocks:
    """How the kernels are compiled for a shape.

    Attributes:
        sizes: of all kernels.
        passing, short_passing: of the states, over long and short documents.
        back_passing: of their gradients, in one launch with dcb and with its warps.
        scan, dcb: of these kernels, whose pipelines are over heads.
        gradients: depths of the pipelines of dx, dB and dC, which are one launch.
        gradient_warps: of that launch.
    """

    sizes: Sizes
    passing: Passing
    short_passing: Passing
    back_passing: Passing
    scan: Tuning = Tuning()
    dcb: Tuning = Tuning()
    gradients: GradientStages = GradientStages(1, 1, 1)
    gradient_warps: int = 4

    @classmethod
    def of(cls, dtype: torch.dtype, head_dim: int, state: int, heads_of_group: int) -> "Blocks":
        if torch.compiler.is_compiling():  # which warns of caches
            return cls._of(dtype, head_dim, state, heads_of_group)
        return _known(dtype, head_dim, state, heads_of_group)

    @classmethod
    def _of(cls, dtype: torch.dtype, head_dim: int, state: int, heads_of_group: int) -> "Blocks":
        # Below 64 columns Triton 3.6 computes products wrongly in loops without a pipeline.
        least = 16 if dtype == torch.float32 else 64
        p, n = max(least, power_of_two(head_dim)), max(least, power_of_two(state))
        heads = max(h for h in range(1, 9) if heads_of_group % h == 0)
        tile, precision = (32, "ieee") if dtype == torch.float32 else (64, "tf32")
        sizes = Sizes(
            head_dim, state, heads_of_group, heads, tile, 2 * tile, p, n, PRECISION=precision
        )
        if dtype == torch.float32:
            return cls(sizes, *[Passing(min(n, 32))] * 3)
        if p * n > 64 * 128:
            short = Passing(min(n, 64))
            wide = Tuning(1, 8)
            return cls(sizes, Passing(min(n, 64), 2, 8), short, short, wide, wide, gradient_warps=8)
        return cls(
            sizes,
            passing=Passing(min(n, 64), 5, 8),
            short_passing=Passing(min(n, 64), 2),
            back_passing=Passing(n, 2),
            scan=Tuning(2),
            dcb=Tuning(3),
            gradients=GradientStages(dx=2, dB=3, dC=3),
        )


_known = functools.cache(Blocks._of)


class Tables(NamedTuple):
    """A layout as the kernels read it, int64 on the device.

    Attributes:
        chunk_start, chunk_end: `[n_chunks]`, first token and end of each chunk.
        document_chunks: `[n_docs + 1]`, the first chunk of each document.
        cu_seqlens: `[n_docs + 1]`.
    """

    chunk_start: Tensor
    chunk_end: Tensor
    document_chunks: Tensor
    cu_seqlens: Tensor

    @property
    def chunks(self) -> int:
        return self.chunk_start.shape[0]

    @property
    def documents(self) -> int:
        return self.cu_seqlens.shape[0] - 1


def chunk_tables(layout: SequenceLayout, Q: int) -> Tables:
    """The tables of a layout, made once of its device tensors.

    The host knows C from the lengths alone.
    """

    def build(layout: SequenceLayout) -> Tables:
        count = sum(-(-length // Q) for length in layout.lengths)
        per_document = (layout.cu_seqlens.diff() + (Q - 1)).div(Q, rounding_mode="floor")
        first = torch.cat([layout.cu_seqlens.new_zeros(1), per_document.cumsum(0)])
        documents = torch.arange(layout.num_documents, device=layout.device)
        owner = documents.repeat_interleave(per_document, output_size=count)
        within = torch.arange(count, device=layout.device) - first.index_select(0, owner)
        start = layout.cu_seqlens.index_select(0, owner) + within * Q
        end = torch.minimum(start + Q, layout.cu_seqlens.index_select(0, owner + 1))
        return Tables(start, end, first, layout.cu_seqlens)

    return layout.derived(("ssd chunks", Q), build)
