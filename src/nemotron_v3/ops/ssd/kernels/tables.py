"""How the kernels cut a layout into chunks, and which blocks they use for a shape.

Letters: T packed tokens, D documents, C chunks, Q tokens of a chunk. A chunk starts at a multiple
of Q counted from its document's first token and ends with the document, so what a document's
results round to does not depend on what is packed beside it. Q is the kernels' own: the model's
`chunk_size` changes no mathematics.
"""

from dataclasses import dataclass

import torch
from torch import Tensor

from nemotron_v3.layout import SequenceLayout
from nemotron_v3.ops._triton import power_of_two


@dataclass(frozen=True)
class Blocks:
    """Sizes of tiles: a chunk is two tiles of `tile` tokens.

    Attributes:
        tile: tokens of a tile; Q is twice as many.
        p, n: head width and state, as the powers of two that hold them.
        slice: columns of the state that one program of the state sweep carries.
        warps, sweep_warps: warps of a program, of the forward sweep's; the reverse sweep has 4.
        heads: heads that a program of the forward scan takes, a divisor of a group's.
        stages, scan_stages, sweep_stages: depth of the software pipeline over heads in the backward
            and the forward, over chunks in the sweeps. A deeper one needs more shared memory, and
            fewer programs then share a multiprocessor.
        precision: of `tl.dot` on fp32 operands.
        registers: most of a thread, so that more programs fit on a multiprocessor; None: no limit.
    """

    tile: int
    p: int
    n: int
    slice: int
    warps: int
    sweep_warps: int
    heads: int
    stages: int
    scan_stages: int
    sweep_stages: int
    precision: str
    registers: int | None = None

    @property
    def chunk(self) -> int:
        return 2 * self.tile

    @classmethod
    def of(cls, dtype: torch.dtype, head_dim: int, state: int, heads_of_group: int) -> "Blocks":
        # Below 64 columns Triton 3.6 computes products wrongly in loops without a pipeline.
        least = 16 if dtype == torch.float32 else 64
        p, n = max(least, power_of_two(head_dim)), max(least, power_of_two(state))
        heads = max(h for h in range(1, 9) if heads_of_group % h == 0)
        if dtype == torch.float32:
            return cls(32, p, n, min(n, 32), 4, 4, heads, 1, 1, 1, "ieee")
        if p * n <= 64 * 128:
            return cls(64, p, n, min(n, 64), 4, 8, heads, 1, 2, 3, "tf32")
        return cls(64, p, n, min(n, 64), 8, 8, heads, 1, 1, 2, "tf32")


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
