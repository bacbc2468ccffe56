"""What a state that comes in late adds to the states before the chunks, and to their gradients.

Letters: n_docs documents, n_chunks chunks, H heads, P head width, N state.

The sweep over the chunks began with 0. What it left out is `e^s I`: the state `I` that the document
began with, by the log-decays `s` of the chunks before; backwards, the gradient `F` of the state it
ends with, by those of the chunks behind. One multiply and one add a number, of states alone.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from nemotron_v3.ops.common.jit import kernel
from nemotron_v3.ops.common.launch import Launcher
from nemotron_v3.ops.ssd.kernels.tables import Tables

BLOCK = 1024


@kernel
def add_state_kernel(
    states, incoming, factors, document, H, SIZE: tl.constexpr, BLOCK: tl.constexpr
):
    """`states[c, h] += factors[c, h] incoming[document[c], h]`, blocks of a state of SIZE."""
    BLOCKS: tl.constexpr = (SIZE + BLOCK - 1) // BLOCK
    i_b = tl.program_id(0) % BLOCKS
    i_ch = (tl.program_id(0) // BLOCKS).to(tl.int64)
    factor = tl.load(factors + i_ch)
    if factor != 0:  # most chunks lie too far from the document's end
        i_d = tl.load(document + i_ch // H)
        o = i_b * BLOCK + tl.arange(0, BLOCK)
        m = o < SIZE
        p_state = states + i_ch * SIZE + o
        # [BLOCK]
        b_in = tl.load(incoming + (i_d * H + i_ch % H) * SIZE + o, mask=m, other=0.0)
        b_S = tl.load(p_state, mask=m, other=0.0).to(tl.float32) + factor * b_in.to(tl.float32)
        tl.store(p_state, b_S.to(states.dtype.element_ty), mask=m)


_add_state = Launcher(add_state_kernel)


class Decays:
    """How much of a state is left, from the running sums of the log-decay.

    Args:
        dA_cumsum: `[H, T, 2]`, as the kernels keep it: to base 2, within a chunk.
        tables: of the layout.

    Attributes:
        whole: `[n_docs, H]` fp32, over each document.
    """

    def __init__(self, dA_cumsum: Tensor, tables: Tables):
        self.tables = tables
        first = tables.document_chunks
        count = first.diff()
        self.document = torch.arange(tables.documents, device=first.device).repeat_interleave(
            count, output_size=tables.chunks
        )
        of_chunk = dA_cumsum[:, tables.chunk_end - 1, 0].double().T  # [n_chunks, H]
        sums = torch.cat([of_chunk.new_zeros(1, of_chunk.shape[1]), of_chunk.cumsum(0)])
        ends = sums.index_select(0, first)  # [n_docs + 1, H]
        self.whole = ends.diff(dim=0).exp2().float()
        before = sums[:-1] - ends.index_select(0, self.document)
        behind = ends.index_select(0, self.document + 1) - sums[1:]
        self._before, self._behind = before.exp2().float(), behind.exp2().float()

    def add_before(self, states: Tensor, initial: Tensor) -> None:
        """To the states before the chunks, what the documents began with."""
        self._add(states, initial, self._before)

    def add_behind(self, dstates: Tensor, dfinal: Tensor) -> None:
        """To the gradients of the states behind the chunks, those of the documents' ends."""
        self._add(dstates, dfinal, self._behind)

    def _add(self, states: Tensor, incoming: Tensor, factors: Tensor) -> None:
        chunks, H, P, N = states.shape
        if not chunks:
            return
        tensors = (states, incoming.contiguous(), factors.contiguous(), self.document)
        programs = chunks * H * triton.cdiv(P * N, BLOCK)
        _add_state(programs, tensors, (H,), (P * N, BLOCK))
