"""The gradients of the tiled scan (README.md, 'How the portable form computes the backward').

Letters: T packed tokens, n_docs documents, H heads, P head width, G groups, R = H / G heads of a
group, N state; n tiles of a slab, q tokens of a tile. `dS` is the gradient with respect to a state,
of all that it does later: the adjoint state of the README.
"""

from collections.abc import Sequence

import torch
from torch import Tensor

from nemotron_v3.ops.common.blocks import Workspace
from nemotron_v3.ops.ssd.slab import (
    Decays,
    Sizes,
    by_group,
    of_heads,
    pass_on,
    scores_of,
    shared,
)
from nemotron_v3.ops.ssd.tiles import Slab, Tiles


def backward(
    x: Tensor,
    dt: Tensor,
    A: Tensor,
    B: Tensor,
    C: Tensor,
    D: Tensor | None,
    initial_dtype: torch.dtype | None,
    kept: Sequence[Tensor],
    tiles: Tiles,
    dy: Tensor | None,
    dfinal: Tensor | None,
    streams: list[Tensor],
) -> tuple[Tensor | None, ...]:
    """Gradients of dt, A, D and the initial states.

    Args:
        initial_dtype: of the initial states; None where there are none.
        kept: what `scan` kept.
        streams: where the gradients of x, B and C are written.
    """
    if dy is None:
        dy = torch.zeros_like(x)
    sizes = Sizes(x, B)
    dstate = dt.new_zeros(tiles.documents, sizes.H, sizes.P, sizes.N)
    if dfinal is not None:
        dstate.copy_(dfinal)
    gradients = _Gradients(x, dt, A, B, C, D, streams, dy, dstate)
    end = len(kept)
    for run in reversed(tiles.runs):
        decays = Decays(run.whole, dt, A, sizes)
        sums = _Sums(decays)
        for some, slab in reversed(run.slabs):
            gradients.add(slab, some, decays, sums, *kept[end - 3 : end])
            end -= 3
        gradients.add_steps(run.whole, decays, sums)
    dinitial = None if initial_dtype is None else dstate.to(initial_dtype)
    return (*gradients.results(), dinitial)


class _Sums:
    """What the gradients of the step sizes of a run are made of, `[n, H, q]` each.

    Attributes:
        themselves: pairs of a token i with itself.
        ends, starts: in fp64, pairs (j, i) of a tile with j < i, by i and by j.
        read: i with all j before its tile.
        trace: j with all i after its tile, for a step and a decay of 1.
        whole: `[n, H]`, `<S_in, dS_out>`.
    """

    def __init__(self, decays: Decays):
        shape = decays.dt.shape
        self.themselves, self.read, self.trace = decays.dt.new_empty(3, *shape)
        self.ends, self.starts = decays.dt.new_empty(2, *shape, dtype=torch.float64)
        self.whole = torch.empty_like(decays.whole)


class _Gradients:
    """Gradients of the streams, written slab by slab from the last, and sums for A and D."""

    def __init__(
        self,
        x: Tensor,
        dt: Tensor,
        A: Tensor,
        B: Tensor,
        C: Tensor,
        D: Tensor | None,
        streams: list[Tensor],
        dy: Tensor,
        dstate: Tensor,
    ) -> None:
        self.dy, self.dstate = dy, dstate
        self.x, self.dt, self.A, self.B, self.C, self.D = x, dt, A, B, C, D
        self.sizes, self.work = Sizes(x, B), Workspace(x, dt.dtype)
        self.work64 = Workspace(x, torch.float64)
        self.dx, self.dB, self.dC = streams
        self.ddt = torch.empty_like(dt, memory_format=torch.contiguous_format)
        self.dA = A.new_zeros(A.shape, dtype=torch.float64)
        self.dD = None if D is None else torch.zeros_like(self.dA)

    def results(self) -> tuple[Tensor | None, ...]:
        dD = None if self.D is None or self.dD is None else self.dD.to(self.D.dtype)
        return self.ddt, self.dA.to(self.A.dtype), dD

    def add(
        self,
        slab: Slab,
        tiles: slice,
        decays: Decays,
        sums: _Sums,
        S_in: Tensor,
        carried: Tensor,
        CB: Tensor,
    ) -> None:
        """A slab whose later ones are done; moves the gradients of the states before its tiles.

        `tiles` is where they are in the run of `decays` and `sums`.
        """
        n, q, sizes, work = slab.count, slab.size, self.sizes, self.work
        H, P, N, G, R = sizes.H, sizes.P, sizes.N, sizes.G, sizes.R
        dyg = work("rows", n, G, q, R, P).copy_(by_group(_gradient_of_tokens(slab, self.dy), sizes))
        dyh = work("dy", n, G, R, q, P).copy_(dyg.transpose(2, 3)).view(n * H, q, P)
        Bg = shared(slab, self.B, work("B", n * G, q, N))
        Cg = shared(slab, self.C, work("C", n * G, q, N))

        # What passes through the states: reading S_in, and leaving a trace in S_out.
        readers = dyg.mul_(decays.from_start[tiles])
        flat = readers.view(n * G, q, R * P)
        added = torch.bmm(flat.transpose(1, 2), Cg, out=work("added", n * G, R * P, N))
        dS_out = work("dS_out", n, H, P, N)
        whole, steps = decays.whole[tiles], reversed(slab.steps)
        pass_on(self.dstate, added.view(S_in.shape), whole, dS_out, steps)
        # Not as a product of a row and a column: BLAS adds up the P N terms one by one, and misses
        # the accuracy rule.
        torch.mul(S_in, dS_out, out=added.view(S_in.shape))
        torch.sum(added.view(n, H, P * N), -1, out=sums.whole[tiles])
        S_in, dS_out = (S.view(n * G, R * P, N) for S in (S_in, dS_out))
        dC = _over_heads(flat, S_in, R, out=work("dC", n * G, q, N))
        # <exp(a_i) dy_i, S_in C_i>
        sums.read[tiles] = of_heads(readers.mul_(carried.view(readers.shape)).sum(-1))

        V = torch.bmm(Bg, dS_out.transpose(1, 2), out=work("V", n * G, q, R * P))
        xg = work("x", n, G, q, R, P).copy_(by_group(slab.take(self.x), sizes))
        xh = work("xh", n, G, R, q, P).copy_(xg.transpose(2, 3)).view(n * H, q, P)
        V = V.view(xg.shape)
        products = torch.mul(xg, V, out=readers)
        sums.trace[tiles] = of_heads(products.sum(-1))  # <x_j, dS_out B_j>
        traces = xg.mul_(decays.trace[tiles]).view(n * G, q, R * P)
        dB = _over_heads(traces, dS_out, R, out=work("dB", n * G, q, N))
        V.mul_(decays.trace[tiles])

        # What passes from token to token of the tile.
        E = torch.bmm(dyh, xh.transpose(1, 2), out=work("E", n * H, q, q)).view(n, H, q, q)
        if self.dD is not None:
            self.dD += E.diagonal(dim1=2, dim2=3).double().sum((0, 2))
        L = decays.between(tiles, out=work("L", n, H, q, q))
        E = E.mul_(L).view(n * G, R, q, q)  # the gradient of CB, head by head
        dCB = E.sum(1)
        dC.baddbmm_(dCB, Bg)
        dB.baddbmm_(dCB.transpose(1, 2), Cg)
        self._add_pairs(E.mul_(CB[:, None]).view(n, H, q, q), sums, tiles)
        scores = scores_of(L, CB, self.D)
        within = torch.bmm(scores.transpose(1, 2), dyh, out=work("xh", n * H, q, P))

        dx = slab.target(self.dx, V.dtype)  # [n, q, H, P]
        within = within.view(n, G, R, q, P).transpose(2, 3)
        torch.add(within, V, out=by_group(dx, sizes))
        slab.put(self.dx, dx)
        for stream, part in ((self.dB, dB), (self.dC, dC)):
            target = slab.target(stream, part.dtype)
            slab.put(stream, target.copy_(part.view(n, G, q, N).transpose(1, 2)))

    def _add_pairs(self, pairs: Tensor, sums: _Sums, tiles: slice) -> None:
        """`[n, H, q, q]`, i by j, 0 for j > i."""
        # A pair of a token with itself lies on no step, and is the largest where decays are strong.
        themselves = pairs.diagonal(dim1=2, dim2=3)
        sums.themselves[tiles] = themselves
        themselves.zero_()
        # Where decays are strong these two cancel almost wholly: they have to be of the same pairs.
        pairs = self.work64("pairs", *pairs.shape).copy_(pairs)
        torch.sum(pairs, 3, out=sums.ends[tiles])
        torch.sum(pairs, 2, out=sums.starts[tiles])

    def add_steps(self, run: Slab, decays: Decays, sums: _Sums) -> None:
        """The gradients of dt and A, once all slabs of a run are added.

        That of a token's log-decay is the weight of all pairs (j, i) with j < t <= i. Four kinds of
        pairs: both in the tile; j before it; i after it; both outside.
        """
        trace = sums.trace.double() * decays.to_end
        traces = trace * decays.dt
        from_here = (sums.ends + sums.read - sums.starts).flip(-1).cumsum(-1).flip(-1)
        until_here = traces.cumsum(-1) - traces
        through = from_here + until_here + (decays.whole * sums.whole)[..., None]
        # Pairs hold a factor dt of their first token; where it is 0, so are they.
        tiny = torch.finfo(decays.dt.dtype).tiny
        direct = (sums.starts + sums.themselves) / decays.dt.clamp(min=tiny) + trace
        ddt = run.target(self.ddt, self.ddt.dtype)
        run.put(self.ddt, ddt.copy_((direct + through * self.A[:, None]).transpose(1, 2)))
        self.dA += (through * decays.dt).sum((0, 2))


def _gradient_of_tokens(slab: Slab, dy: Tensor) -> Tensor:
    """The slab's part of dy, `[n, q, H, P]`; a place without a token has no gradient."""
    part = slab.take(dy)
    return part if slab.valid is None else part.masked_fill(~slab.valid[..., None, None], 0)


def _over_heads(rows: Tensor, states: Tensor, R: int, out: Tensor) -> Tensor:
    """`[n*G, q, R*P] @ [n*G, R*P, N]`."""
    if rows.shape[1] > 1:
        return torch.bmm(rows, states, out=out)
    # Of a single row BLAS adds up the R P terms one by one, too many for differences of large
    # numbers, which a lone token's gradients of B and C are behind the gated norm.
    rows, states = rows.view(-1, 1, rows.shape[2] // R), states.unflatten(1, (R, -1)).flatten(0, 1)
    return torch.sum(torch.bmm(rows, states).unflatten(0, (-1, R)), 1, out=out)
