"""State-space duality, tile by tile, in plain PyTorch (Mamba-2, arXiv 2405.21060, section 6).

Letters: T packed tokens, n_docs documents, H heads, P head width, G groups, R = H / G heads of a
group, N state; n tiles of a slab, q tokens of a tile.

Within a tile the recurrence is a masked matrix product; between tiles one state per head passes on.
With `a_i` the sum of `dt A` over the tokens of the tile up to and including i,

    y_i = sum_{j <= i} exp(a_i - a_j) (C_i . B_j) dt_j x_j  +  exp(a_i) S_in C_i  +  D x_i
    S_out = exp(a_last) S_in + sum_j exp(a_last - a_j) dt_j x_j B_j^T

D stands on the diagonal of the first sum's matrix. Heads of a group share B and C: their products
run once a group, never on a copy per head. The backward pass keeps the inputs (of the initial
states their dtype alone), the states between tiles, `S_in C` and `C B^T`, and computes everything
else again: memory is linear in the length.
"""

from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from nemotron_v3.layout import SequenceLayout
from nemotron_v3.ops.common.blocks import Workspace, block_elements
from nemotron_v3.ops.common.precision import WIDE, needs_grad
from nemotron_v3.ops.common.step_sizes import step_sizes
from nemotron_v3.ops.ssd.portable_backward import backward
from nemotron_v3.ops.ssd.slab import (
    Decays,
    Sizes,
    by_group,
    pass_on,
    scores_of,
    shared,
)
from nemotron_v3.ops.ssd.tiles import Slab, Tiles

# Pairs of tokens grow with the tile, states with its inverse: around 64 they cost the same.
TILE = 64
# Of an array of a slab on a CPU. About fifteen of them are in use at a time, and products whose
# operands have left the second-level cache run at two thirds of their speed.
SLAB_ELEMENTS = 1 << 17


def ssd(
    x: Tensor,
    dt: Tensor,
    A: Tensor,
    B: Tensor,
    C: Tensor,
    *,
    D: Tensor | None = None,
    dt_bias: Tensor | None = None,
    dt_limit: tuple[float, float] = (0.0, float("inf")),
    layout: SequenceLayout,
    chunk_size: int = 128,
    initial_states: Tensor | None = None,
    return_final_states: bool = True,
) -> tuple[Tensor, Tensor | None]:
    tiles = tiles_of(layout, x, chunk_size)
    dt = step_sizes(dt, dt_bias, dt_limit).to(WIDE[x.dtype])
    keep = needs_grad(x, dt, A, B, C, D, initial_states)
    y, final = _Scan.apply(x, dt, A, B, C, D, initial_states, tiles, keep)
    return y, final if return_final_states else None


class _Scan(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        x: Tensor,
        dt: Tensor,
        A: Tensor,
        B: Tensor,
        C: Tensor,
        D: Tensor | None,
        initial_states: Tensor | None,
        tiles: Tiles,
        keep: bool,
    ) -> tuple[Tensor, Tensor]:
        y, final, kept = scan(x, dt, A, B, C, D, initial_states, tiles, keep)
        ctx.set_materialize_grads(False)
        ctx.save_for_backward(x, dt, A, B, C, D, *kept)
        ctx.initial_dtype = None if initial_states is None else initial_states.dtype
        ctx.tiles = tiles
        return y, final

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, dy: Tensor | None, dfinal: Tensor | None) -> tuple[Tensor | None, ...]:
        x, dt, A, B, C, D, *kept = ctx.saved_tensors
        streams = [torch.empty_like(t, memory_format=torch.contiguous_format) for t in (x, B, C)]
        others = backward(
            x, dt, A, B, C, D, ctx.initial_dtype, kept, ctx.tiles, dy, dfinal, streams
        )
        dx, dB, dC = streams
        ddt, dA, dD, dinitial = others
        return dx, ddt, dA, dB, dC, dD, dinitial, None, None


def tiles_of(layout: SequenceLayout, x: Tensor, chunk_size: int) -> Tiles:
    """How the layout is cut for `x` `[T, H, P]`."""
    tile_size = min(chunk_size, TILE) if x.is_cpu else chunk_size
    elements = block_elements(x.device)
    if x.is_cpu:
        elements = min(SLAB_ELEMENTS, elements)
    return Tiles.of(layout, tile_size, elements // (x.shape[1] * max(tile_size, x.shape[2])))


def scan(
    x: Tensor,
    dt: Tensor,
    A: Tensor,
    B: Tensor,
    C: Tensor,
    D: Tensor | None,
    initial_states: Tensor | None,
    tiles: Tiles,
    keep: bool,
) -> tuple[Tensor, Tensor, list[Tensor]]:
    """The forward pass, outside autograd: y, the final states, and what the backward pass needs.

    That is, for each slab, the states that its tiles meet, `[n, H, P, N]`, `S_in C_i`, `[n*G, q,
    R*P]`, and `C_i . B_j`, `[n*G, q, q]`; without `keep` the list is empty.
    """
    sizes, dtype = Sizes(x, B), WIDE[x.dtype]
    state = x.new_zeros(tiles.documents, sizes.H, sizes.P, sizes.N, dtype=dtype)
    if initial_states is not None:
        state.copy_(initial_states)
    y = torch.empty_like(x, memory_format=torch.contiguous_format)
    slabs, kept = _Slabs(x, B, C, D, state), []
    for run in tiles.runs:
        decays = Decays(run.whole, dt, A, sizes)
        for some, slab in run.slabs:
            part = slab.target(y, dtype)  # [n, q, H, P]
            of_slab = slabs.scan(slab, some, decays, part)
            slab.put(y, part)
            kept += of_slab if keep else ()
    return y, state, kept


class _Slabs:
    """The scan of one slab after the other."""

    def __init__(self, x: Tensor, B: Tensor, C: Tensor, D: Tensor | None, state: Tensor) -> None:
        self.x, self.B, self.C, self.D, self.state = x, B, C, D, state
        self.sizes, self.work = Sizes(x, B), Workspace(x, state.dtype)

    def scan(self, slab: Slab, tiles: slice, decays: Decays, y: Tensor) -> tuple[Tensor, ...]:
        """Writes y and moves the states on; returns what `scan` keeps of a slab.

        `tiles` is where the slab's are in the run of `decays`.
        """
        n, q, work, sizes = slab.count, slab.size, self.work, self.sizes
        H, P, G, R, N = sizes.H, sizes.P, sizes.G, sizes.R, sizes.N
        x = work("x", n, G, q, R, P).copy_(by_group(slab.take(self.x), sizes))
        B = shared(slab, self.B, work("B", n * G, q, N))
        C = shared(slab, self.C, work("C", n * G, q, N))

        traces = torch.mul(x, decays.trace[tiles], out=work("rows", *x.shape))
        traces = traces.view(n * G, q, R * P).transpose(1, 2)
        added = torch.bmm(traces, B, out=work("added", n * G, R * P, N)).view(n, H, P, N)
        S_in = torch.empty_like(added)
        pass_on(self.state, added, decays.whole[tiles], S_in, slab.steps)
        carried = torch.bmm(C, S_in.view(n * G, R * P, N).transpose(1, 2))  # [n*G, q, R*P]

        CB = torch.bmm(C, B.transpose(1, 2))
        scores = scores_of(decays.between(tiles, out=work("scores", n, H, q, q)), CB, self.D)
        xh = work("rows", n, G, R, q, P).copy_(x.transpose(2, 3))
        within = torch.bmm(scores, xh.view(n * H, q, P), out=work("x", n * H, q, P))
        torch.addcmul(
            within.view(xh.shape).transpose(2, 3),
            carried.view(x.shape),
            decays.from_start[tiles],
            out=by_group(y, sizes),
        )
        return S_in, carried, CB
