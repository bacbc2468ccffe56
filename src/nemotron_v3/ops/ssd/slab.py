"""What forward and backward of the portable scan share: a slab's streams, and its decays.

Letters: T packed tokens, H heads, P head width, G groups, R = H / G heads of a group, N state; n
tiles of a slab, q tokens of a tile.

Products run in the layouts that let them run without a copy per head: what heads of a group share
(B, C, their products) is `[n*G, q, N]` and meets all R heads at once as `[q, R*P]`; what each head
has of its own is `[n*H, q, ...]`. A stream is brought into a layout by one plain copy, and then
everything works on adjacent memory: a pass over strided rows of P costs two to three of those.
"""

import math
from collections.abc import Iterable

import torch
from torch import Tensor

from nemotron_v3.ops.ssd.tiles import Rows, Slab, take

LOG2_E = 1 / math.log(2)


class Sizes:
    """The letters of one call."""

    def __init__(self, x: Tensor, B: Tensor):
        self.H, self.P = x.shape[1:]
        self.G, self.N = B.shape[1:]
        self.R = self.H // self.G


class Decays:
    """The log-decays of a run of tiles and the factors made of them.

    With `a_i` the sum of `dt A` over the tokens of the tile up to and including i, in units of
    log2: the power of two is the cheaper one. An error of a log-decay is a relative error of all
    that it multiplies, and differences of `a` are small numbers made of large ones: it is fp64,
    and taken from two narrow halves, of which the coarse ones cancel first.

    Attributes:
        dt: `[n, H, q]`, 0 where there is no token: no step, no trace.
        to_end: `[n, H, q]`, the decay from each token to the end of the tile.
        whole: `[n, H]`, the decay from before a tile to its end.
        from_start: `[n, G, q, R, 1]`, from before the tile to each token.
        trace: `[n, G, q, R, 1]`, dt times the decay from each token to the end of the tile.
    """

    def __init__(self, run: Slab, dt: Tensor, A: Tensor, sizes: Sizes):
        steps = run.take(dt)
        if run.valid is not None:
            steps = steps.masked_fill(~run.valid[..., None], 0)
        self.dt: Tensor = steps.transpose(1, 2).contiguous()
        a = (self.dt.double() * (A.double() * LOG2_E)[:, None]).cumsum(2)  # [n, H, q]
        self._coarse = a.to(dt.dtype)
        self._fine = (a - self._coarse).to(dt.dtype)
        self.to_end: Tensor = torch.exp2((a[..., -1:] - a).to(dt.dtype))
        from_start = torch.exp2(self._coarse)
        self.whole: Tensor = from_start[..., -1]
        self.from_start: Tensor = of_rows(from_start, sizes)
        self.trace: Tensor = of_rows(self.dt * self.to_end, sizes)
        # For j > i the difference is positive and may be large: it is taken out before it becomes
        # an infinity, which no 0 can undo.
        q = run.size
        self._future = torch.full((q, q), -math.inf, dtype=dt.dtype, device=dt.device).triu_(1)

    def between(self, tiles: slice, out: Tensor) -> Tensor:
        """`[tiles, H, q, q]`, written to `out`: dt of token j times the decay from it to token i
        for j <= i, 0 elsewhere."""
        torch.sub(self._coarse[tiles].unsqueeze(3), self._coarse[tiles].unsqueeze(2), out=out)
        out.add_(self._fine[tiles].unsqueeze(3)).sub_(self._fine[tiles].unsqueeze(2))
        return out.add_(self._future).exp2_().mul_(self.dt[tiles].unsqueeze(2))


def scores_of(between: Tensor, CB: Tensor, D: Tensor | None) -> Tensor:
    """`[n, H, q, q]` and `[n*G, q, q]` -> `[n*H, q, q]`, in place of `between`: what multiplies the
    x of the tile's tokens."""
    n, H, q, _ = between.shape
    between.view(len(CB), -1, q, q).mul_(CB[:, None])
    if D is not None:
        between.diagonal(dim1=2, dim2=3).add_(D.to(between.dtype)[:, None])
    return between.view(n * H, q, q)


def of_rows(factors: Tensor, sizes: Sizes) -> Tensor:
    """`[n, H, q]` -> `[n, G, q, R, 1]`, for the rows of an array `[n, G, q, R, P]`."""
    return factors.unflatten(1, (sizes.G, sizes.R)).transpose(2, 3).contiguous()[..., None]


def of_heads(sums: Tensor) -> Tensor:
    """`[n, G, q, R]` -> `[n, H, q]`."""
    return sums.transpose(2, 3).flatten(1, 2)


def by_group(array: Tensor, sizes: Sizes) -> Tensor:
    """`[n, q, H, ...]` -> `[n, G, q, R, ...]`, a view."""
    n, q, _, *rest = array.shape
    return array.view(n, q, sizes.G, sizes.R, *rest).transpose(1, 2)


def shared(slab: Slab, stream: Tensor, out: Tensor) -> Tensor:
    """A stream `[T, G, N]` as `[n*G, q, N]`."""
    part = slab.take(stream).transpose(1, 2)
    return out.view(part.shape).copy_(part).flatten(0, 1)


def pass_on(
    state: Tensor,
    added: Tensor,
    whole: Tensor,
    seen: Tensor,
    steps: Iterable[tuple[Rows, Rows]],
) -> None:
    """The states of documents through a slab: what each tile meets is written to `seen`.

    Args:
        state: `[n_docs, H, P, N]`, moves on in place.
        added: `[n, H, P, N]`, what each tile adds.
        whole: `[n, H]`, what each tile leaves of a state.
        seen: as `added`.
        steps: of the slab, in the order of time or against it.
    """
    whole = whole[..., None, None]
    for tiles, documents in steps:
        of_step = take(state, documents)
        seen[tiles] = of_step
        if isinstance(documents, slice):
            torch.addcmul(take(added, tiles), take(whole, tiles), of_step, out=of_step)
        else:
            state[documents] = take(added, tiles).addcmul(take(whole, tiles), of_step)
