"""State-space duality, tile by tile, in plain PyTorch (Mamba-2, arXiv 2405.21060, section 6).

Letters: T packed tokens, D documents, H heads, P head width, G groups, R = H / G heads of a group,
N state; n tiles of a slab, q tokens of a tile.

Within a tile the recurrence is a masked matrix product; between tiles one state per head passes on.
With `a_i` the sum of `dt A` over the tokens of the tile up to and including i,

    y_i = sum_{j <= i} exp(a_i - a_j) (C_i . B_j) dt_j x_j  +  exp(a_i) S_in C_i  +  D x_i
    S_out = exp(a_last) S_in + sum_j exp(a_last - a_j) dt_j x_j B_j^T

Heads of a group share B and C: their products run once a group, never on a copy per head. The
backward pass keeps the inputs, the states between tiles and `S_in C`, and computes everything else
again: memory is linear in the length.
"""

from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from nemotron_v3.layout import SequenceLayout
from nemotron_v3.ops._blocks import Workspace, block_elements
from nemotron_v3.ops._dispatch import needs_grad, wide
from nemotron_v3.ops._step_sizes import step_sizes
from nemotron_v3.ops.ssd.portable_backward import backward
from nemotron_v3.ops.ssd.slab import (
    Decays,
    Sizes,
    add_decayed,
    by_group,
    shared,
    states_product,
    whole_decays,
)
from nemotron_v3.ops.ssd.tiles import Slab, Tiles, take

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
    dt = step_sizes(dt, dt_bias, dt_limit).to(wide(x.dtype))
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
        y, states, carried = scan(x, dt, A, B, C, D, initial_states, tiles, keep)
        ctx.set_materialize_grads(False)
        ctx.save_for_backward(x, dt, A, B, C, D, initial_states, states, *carried)
        ctx.tiles = tiles
        return y, take(states, tiles.final).clone()

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, dy: Tensor | None, dfinal: Tensor | None) -> tuple[Tensor | None, ...]:
        x, dt, A, B, C, D, initial_states, states, *carried = ctx.saved_tensors
        streams = [torch.empty_like(t, memory_format=torch.contiguous_format) for t in (x, B, C)]
        kept = states, carried, ctx.tiles
        others = backward(x, dt, A, B, C, D, initial_states, kept, dy, dfinal, streams)
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
    """The forward pass, outside autograd: y, and what the backward pass needs of it.

    Those are the states, `[state_rows, H, P, N]`, and for each slab `S_in C_i`, `[n*G, q, R*P]`;
    without `keep` the list is empty.
    """
    decays = [Decays(slab, dt, A) for slab in tiles.slabs]
    states = _states(x, B, initial_states, tiles, decays)
    carried = [] if keep else None
    y = _outputs(x, B, C, D, states, tiles, decays, carried)
    return y, states, carried or []


def _states(
    x: Tensor, B: Tensor, initial_states: Tensor | None, tiles: Tiles, decays: list[Decays]
) -> Tensor:
    """The state around each tile, `[state_rows, H, P, N]`."""
    sizes, dtype = Sizes(x, B), wide(x.dtype)
    work = Workspace(x, dtype)
    states = x.new_empty(tiles.state_rows, sizes.H, sizes.P, sizes.N, dtype=dtype)
    states[tiles.initial] = 0 if initial_states is None else initial_states.to(dtype)
    for slab, decay in zip(tiles.slabs, decays, strict=True):
        batch, q = slab.count * sizes.G, slab.size
        kept = work("kept", slab.count, sizes.G, q, sizes.R, sizes.P)
        factors = by_group((decay.dt * decay.to_end())[..., None], sizes)
        torch.mul(by_group(slab.take(x), sizes), factors, out=kept)
        Bg = shared(slab, B, work("B", batch, q, sizes.N))
        states_product(kept.view(batch, q, -1).transpose(1, 2), Bg, states, slab.after, work)
    whole = whole_decays(decays, states)
    for numbers, before, after in tiles.steps:
        add_decayed(states, after, take(whole, numbers), before)
    return states


def _outputs(
    x: Tensor,
    B: Tensor,
    C: Tensor,
    D: Tensor | None,
    states: Tensor,
    tiles: Tiles,
    decays: list[Decays],
    carried: list[Tensor] | None,
) -> Tensor:
    """y; what the states contribute to each slab is added to `carried`."""
    sizes, work = Sizes(x, B), Workspace(x, states.dtype)
    y = torch.empty_like(x, memory_format=torch.contiguous_format)
    skip = None if D is None else D.to(states.dtype)[:, None]
    for slab, decay in zip(tiles.slabs, decays, strict=True):
        part = slab.target(y, states.dtype)  # [n, q, H, P]
        of_states = _slab_outputs(slab, decay, sizes, work, (x, B, C, skip), states, part)
        if carried is not None:
            carried.append(of_states)
        slab.put(y, part)
    return y


def _slab_outputs(
    slab: Slab,
    decay: Decays,
    sizes: Sizes,
    work: Workspace,
    streams: tuple[Tensor, Tensor, Tensor, Tensor | None],
    states: Tensor,
    y: Tensor,
) -> Tensor:
    """Writes y, and returns `S_in C_i`."""
    n, q, H, P, G, R, N = slab.count, slab.size, sizes.H, sizes.P, sizes.G, sizes.R, sizes.N
    x, B, C, skip = streams
    x = slab.take(x)
    Bg = shared(slab, B, work("B", n * G, q, N))
    Cg = shared(slab, C, work("C", n * G, q, N))

    CB = torch.bmm(Cg, Bg.transpose(1, 2), out=work("CB", n * G, q, q))
    scores = decay.between(out=work("scores", n, H, q, q))
    scores.view(n * G, R, q, q).mul_(CB[:, None])
    dtx = work("dtx", n, H, q, P)
    torch.mul(x.transpose(1, 2), decay.dt.transpose(1, 2)[..., None], out=dtx)
    within = torch.bmm(scores.flatten(0, 1), dtx.flatten(0, 1), out=work("within", n * H, q, P))

    before = take(states, slab.before).reshape(n * G, R * P, N)
    carried = torch.bmm(Cg, before.transpose(1, 2))  # [n*G, q, R*P]
    from_start = by_group(decay.from_start()[..., None], sizes)
    torch.mul(carried.view(n, G, q, R, P), from_start, out=by_group(y, sizes))
    y.add_(within.view(n, H, q, P).transpose(1, 2))
    if skip is not None:
        y.addcmul_(x, skip)
    return carried
