"""The gradients of the tiled scan (README.md, 'How the portable form computes the backward').

Letters: T packed tokens, D documents, H heads, P head width, G groups, R = H / G heads of a group,
N state; n tiles of a slab, q tokens of a tile. `dS` is the gradient with respect to a state, of all
that it does later: the adjoint state of the README.
"""

import torch
from torch import Tensor

from nemotron_v3.ops._blocks import Workspace
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


def backward(
    x: Tensor,
    dt: Tensor,
    A: Tensor,
    B: Tensor,
    C: Tensor,
    D: Tensor | None,
    initial_states: Tensor | None,
    kept: tuple[Tensor, list[Tensor], Tiles],
    dy: Tensor | None,
    dfinal: Tensor | None,
    streams: list[Tensor],
) -> tuple[Tensor | None, ...]:
    """Gradients of dt, A, D and the initial states.

    Args:
        kept: of the forward pass, states and `S_in C_i` (see `scan`), and the tiles.
        streams: where the gradients of x, B and C are written.
    """
    states, carried, tiles = kept
    if dy is None:
        dy = torch.zeros_like(x)
    decays = [Decays(slab, dt, A) for slab in tiles.slabs]
    dstates = _dstates(C, states, tiles, decays, dy, dfinal)
    gradients = _Gradients(x, dt, A, B, C, D, streams)
    for slab, decay, of_slab in zip(tiles.slabs, decays, carried, strict=True):
        gradients.add(slab, decay, states, of_slab, dstates, dy)
    dinitial = None
    if initial_states is not None:
        dinitial = take(dstates, tiles.initial).to(initial_states.dtype, copy=True)
    return (*gradients.results(), dinitial)


def _dstates(
    C: Tensor,
    states: Tensor,
    tiles: Tiles,
    decays: list[Decays],
    dy: Tensor,
    dfinal: Tensor | None,
) -> Tensor:
    """The gradient with respect to the state in each row, `[state_rows, H, P, N]`.

    `dS_in = sum_i exp(a_i) dy_i C_i^T + exp(a_last) dS_out`, from the last tile to the first.
    """
    sizes, work = Sizes(dy, C), Workspace(states, states.dtype)
    dstates = torch.empty_like(states)
    dstates[tiles.final] = 0 if dfinal is None else dfinal
    for slab, decay in zip(tiles.slabs, decays, strict=True):
        batch, q = slab.count * sizes.G, slab.size
        dy_decayed = work("dy", slab.count, sizes.G, q, sizes.R, sizes.P)
        from_start = by_group(decay.from_start()[..., None], sizes)
        torch.mul(by_group(_real(slab, dy, states.dtype), sizes), from_start, out=dy_decayed)
        Cg = shared(slab, C, work("C", batch, q, sizes.N))
        transposed = dy_decayed.view(batch, q, -1).transpose(1, 2)
        states_product(transposed, Cg, dstates, slab.before, work)
    whole = whole_decays(decays, states)
    for numbers, before, after in reversed(tiles.steps):
        add_decayed(dstates, before, take(whole, numbers), after)
    return dstates


def _real(slab: Slab, dy: Tensor, dtype: torch.dtype) -> Tensor:
    """The slab's part of dy, `[n, q, H, P]`; a place without a token has no gradient."""
    part = slab.take(dy).to(dtype)
    return part if slab.valid is None else part.masked_fill(~slab.valid[..., None, None], 0)


class _Gradients:
    """Gradients of the streams, written slab by slab, and sums for A and D."""

    def __init__(
        self,
        x: Tensor,
        dt: Tensor,
        A: Tensor,
        B: Tensor,
        C: Tensor,
        D: Tensor | None,
        streams: list[Tensor],
    ) -> None:
        self.x, self.dt, self.A, self.B, self.C, self.D = x, dt, A, B, C, D
        self.sizes, self.work = Sizes(x, B), Workspace(x, dt.dtype)
        self.work64 = Workspace(x, torch.float64)
        self.dx, self.dB, self.dC = streams
        self.ddt = torch.empty_like(dt, memory_format=torch.contiguous_format)
        self.dA = A.new_zeros(A.shape, dtype=torch.float64)
        self.dD = None if D is None else torch.zeros_like(self.dA)

    def results(self) -> tuple[Tensor | None, ...]:
        dD = None if self.D is None else self.dD.to(self.D.dtype)
        return self.ddt, self.dA.to(self.A.dtype), dD

    def add(
        self,
        slab: Slab,
        decays: Decays,
        states: Tensor,
        carried: Tensor,
        dstates: Tensor,
        dy: Tensor,
    ) -> None:
        n, q, sizes, work = slab.count, slab.size, self.sizes, self.work
        H, P, N, G, R = sizes.H, sizes.P, sizes.N, sizes.G, sizes.R
        x, dy_part = slab.take(self.x).to(self.dt.dtype), _real(slab, dy, self.dt.dtype)
        Bg = shared(slab, self.B, work("B", n * G, q, N))
        Cg = shared(slab, self.C, work("C", n * G, q, N))
        S_in = take(states, slab.before).reshape(n * G, R * P, N)
        dS_out = take(dstates, slab.after).reshape(n * G, R * P, N)

        # What passes through the states: reading S_in, and leaving a trace in S_out.
        dy_decayed = work("dy_decayed", n, G, q, R, P)
        from_start = by_group(decays.from_start()[..., None], sizes)
        torch.mul(by_group(dy_part, sizes), from_start, out=dy_decayed)
        dC = torch.bmm(dy_decayed.view(n * G, q, R * P), S_in, out=work("dC", n * G, q, N))
        read = torch.mul(
            carried.view(n, G, q, R, P), dy_decayed, out=work("product", n, G, q, R, P)
        ).sum(-1)  # <exp(a_i) dy_i, S_in C_i>

        to_end = by_group(decays.to_end()[..., None], sizes)
        step = by_group(decays.dt[..., None], sizes)
        ddtx = torch.bmm(Bg, dS_out.transpose(1, 2), out=work("ddtx", n * G, q, R * P))
        ddtx = ddtx.view(n, G, q, R, P).mul_(to_end)
        dtx = torch.mul(by_group(x, sizes), step, out=work("dtx", n, G, q, R, P))
        trace = torch.mul(ddtx, dtx, out=work("product", n, G, q, R, P)).sum(-1)
        kept = dtx.mul_(to_end).view(n * G, q, R * P)
        dB = torch.bmm(kept, dS_out, out=work("dB", n * G, q, N))

        # What passes from token to token of the tile.
        dyh = work("dyh", n, H, q, P).copy_(dy_part.transpose(1, 2)).flatten(0, 1)
        dtxh = torch.mul(
            x.transpose(1, 2), decays.dt.transpose(1, 2)[..., None], out=work("dtxh", n, H, q, P)
        ).flatten(0, 1)
        CB = torch.bmm(Cg, Bg.transpose(1, 2), out=work("CB", n * G, q, q))[:, None]
        L = decays.between(out=work("L", n, H, q, q)).view(n * G, R, q, q)
        E = torch.bmm(dyh, dtxh.transpose(1, 2), out=work("E", n * H, q, q))
        E = E.view(n * G, R, q, q).mul_(L)  # the gradient of CB, head by head
        dCB = E.sum(1)
        dC.baddbmm_(dCB, Bg)
        dB.baddbmm_(dCB.transpose(1, 2), Cg)
        scores = L.mul_(CB).view(n * H, q, q)
        within = torch.bmm(scores.transpose(1, 2), dyh, out=work("within", n * H, q, P))
        pairs = E.mul_(CB).view(n, H, q, q)
        # A pair of a token with itself lies on no step, and is the largest where decays are strong.
        pairs.diagonal(dim1=-2, dim2=-1).zero_()
        ddtx.add_(within.view(n, G, R, q, P).transpose(2, 3))

        # Not as a product of a row and a column: BLAS adds up the P N terms one by one, and misses
        # the accuracy rule.
        terms = torch.mul(S_in, dS_out, out=work("states", *S_in.shape))
        whole = decays.whole * terms.view(n, H, P * N).sum(-1)
        through = self._through(pairs, read, trace, whole)  # [n, q, H]
        self._store(slab, x, dy_part, ddtx, decays, through)
        for stream, part in ((self.dB, dB), (self.dC, dC)):
            target = slab.target(stream, part.dtype)
            slab.put(stream, target.copy_(part.view(n, G, q, N).transpose(1, 2)))

    def _through(self, pairs: Tensor, read: Tensor, trace: Tensor, whole: Tensor) -> Tensor:
        """The gradient of each token's log-decay: the weight of all pairs (j, i) with j < t <= i.

        Four kinds of pairs: both in the tile; j before it; i after it; both outside.

        Args:
            pairs: `[n, H, q, q]`, i by j, 0 for j >= i.
            read: `[n, G, q, R]`, i with all j before the tile.
            trace: `[n, G, q, R]`, j with all i after the tile.
            whole: `[n, H]`.

        Returns:
            `[n, q, H]` in fp64.
        """
        read, trace = (t.transpose(1, 2).flatten(2).double() for t in (read, trace))
        # Where decays are strong these two cancel almost wholly: they have to be of the same pairs.
        pairs = self.work64("pairs", *pairs.shape).copy_(pairs)
        ends, starts = pairs.sum(-1), pairs.sum(-2)
        ends_less_starts = (ends - starts).transpose(1, 2)
        from_here = (read + ends_less_starts).flip(1).cumsum(1).flip(1)
        until_here = trace.cumsum(1) - trace
        return from_here + until_here + whole[:, None]

    def _store(
        self,
        slab: Slab,
        x: Tensor,
        dy: Tensor,
        ddtx: Tensor,
        decays: Decays,
        through: Tensor,
    ) -> None:
        sizes = self.sizes
        xg, dyg = by_group(x, sizes), by_group(dy, sizes)
        product = self.work("product", *ddtx.shape)
        torch.mul(xg, ddtx, out=product)
        direct = product.sum(-1).transpose(1, 2).flatten(2)  # [n, q, H]
        ddt = slab.target(self.ddt, self.ddt.dtype)
        slab.put(self.ddt, torch.add(direct, through * self.A, out=ddt))
        self.dA += (through * decays.dt).sum((0, 1))

        dx = slab.target(self.dx, ddtx.dtype)  # [n, q, H, P]
        torch.mul(ddtx, by_group(decays.dt[..., None], sizes), out=by_group(dx, sizes))
        if self.D is not None:
            dx.addcmul_(dy, self.D.to(dx.dtype)[:, None])
            per_head = torch.mul(dyg, xg, out=product).sum(-1).transpose(1, 2).flatten(2)
            self.dD += per_head.double().sum((0, 1))
        slab.put(self.dx, dx)
