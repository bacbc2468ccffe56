"""How the kernels cut a layout into chunks, and which blocks they use for a shape.

Letters: T packed tokens, D documents, C chunks, Q tokens of a chunk. A chunk starts at a multiple
of Q counted from its document's first token and ends with the document, so what a document's
results round to does not depend on what is packed beside it. Q is the kernels' own: the model's
`chunk_size` changes no mathematics.
"""

import functools
from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor

from nemotron_v3.layout import SequenceLayout
from nemotron_v3.ops.common.host import power_of_two


class Tuning(NamedTuple):
    """How a kernel that loops over heads is compiled.

    Attributes:
        stages: depth of its software pipeline. A deeper one needs more shared memory, and fewer
            programs then share a multiprocessor.
        warps: of a program.
    """

    stages: int = 1
    warps: int = 4


class Sweep(NamedTuple):
    """How a sweep of the states, whose pipeline is over chunks, is cut and compiled.

    Attributes:
        slice: columns of the state that one program carries.
        stages, warps: as of `Tuning`.
    """

    slice: int
    stages: int = 1
    warps: int = 4


@dataclass(frozen=True)
class Blocks:
    """Sizes of tiles: a chunk is two tiles of `tile` tokens.

    Attributes:
        tile: tokens of a tile; Q is twice as many.
        p, n: head width and state, as the powers of two that hold them.
        heads: heads that a program of the scan or of dx takes, a divisor of a group's.
        precision: of `tl.dot` on fp32 operands.
        sweep, short_sweep: of the states, over long and short documents.
        back_sweep: of their gradients, in one launch with the pairs and with their warps.
        scan, pairs, dx, dB, dC: of these kernels, whose pipelines are over heads; the last three
            are one launch, with the warps of dx.
    """

    tile: int
    p: int
    n: int
    heads: int
    precision: str
    sweep: Sweep
    short_sweep: Sweep
    back_sweep: Sweep
    scan: Tuning = Tuning()
    pairs: Tuning = Tuning()
    dx: Tuning = Tuning()
    dB: Tuning = Tuning()
    dC: Tuning = Tuning()

    @property
    def chunk(self) -> int:
        return 2 * self.tile

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
        if dtype == torch.float32:
            return cls(32, p, n, heads, "ieee", *[Sweep(min(n, 32))] * 3)
        if p * n > 64 * 128:
            return cls(
                *(64, p, n, heads, "tf32"),
                sweep=Sweep(min(n, 64), 2, 8),
                short_sweep=Sweep(min(n, 64)),
                back_sweep=Sweep(min(n, 64)),
                **dict.fromkeys(("scan", "pairs", "dx", "dB", "dC"), Tuning(1, 8)),
            )
        return cls(
            *(64, p, n, heads, "tf32"),
            sweep=Sweep(min(n, 64), 5, 8),
            short_sweep=Sweep(min(n, 64), 2),
            back_sweep=Sweep(n, 2),
            scan=Tuning(2),
            pairs=Tuning(3),
            dx=Tuning(2),
            dB=Tuning(3),
            dC=Tuning(3),
        )


_known = functools.cache(Blocks._of)


def chunk_tables(layout: SequenceLayout, Q: int) -> tuple[Tensor, Tensor, Tensor]:
    """int64: first token `[C]` and end `[C]` of each chunk, first chunk of each document `[D+1]`.

    Made of the layout's device tensors, once: the host knows C from the lengths alone.
    """

    def build(layout: SequenceLayout) -> tuple[Tensor, Tensor, Tensor]:
        count = sum(-(-length // Q) for length in layout.lengths)
        per_document = (layout.cu_seqlens.diff() + (Q - 1)).div(Q, rounding_mode="floor")
        first = torch.cat([layout.cu_seqlens.new_zeros(1), per_document.cumsum(0)])
        documents = torch.arange(layout.num_documents, device=layout.device)
        owner = documents.repeat_interleave(per_document, output_size=count)
        within = torch.arange(count, device=layout.device) - first.index_select(0, owner)
        start = layout.cu_seqlens.index_select(0, owner) + within * Q
        end = torch.minimum(start + Q, layout.cu_seqlens.index_select(0, owner + 1))
        return start, end, first

    return layout.derived(("ssd chunks", Q), build)
