"""What forward and backward of the portable scan share: a slab's streams, and its decays.

Letters: T packed tokens, H heads, P head width, G groups, R = H / G heads of a group, N state; n
tiles of a slab, q tokens of a tile.

Products run in the layouts that let them run without a copy per head: what heads of a group share
(B, C, their products) is `[n*G, q, N]` and meets all R heads at once as `[q, R*P]`; what each head
has of its own is `[n*H, q, ...]`.
"""

import math

import torch
from torch import Tensor

from nemotron_v3.ops._blocks import Workspace
from nemotron_v3.ops.ssd.tiles import Rows, Slab, take

LOG2_E = 1 / math.log(2)


class Sizes:
    """The letters of one call."""

    def __init__(self, x: Tensor, B: Tensor):
        self.H, self.P = x.shape[1:]
        self.G, self.N = B.shape[1:]
        self.R = self.H // self.G


class Decays:
    """The log-decays of a slab and the factors made of them.

    With `a_i` the sum of `dt A` over the tokens of the tile up to and including i, in units of
    log2: the power of two is the cheaper one. An error of a log-decay is a relative error of all
    that it multiplies, and differences of `a` are small numbers made of large ones: it is fp64.

    Attributes:
        dt: `[n, q, H]`, 0 where there is no token: no step, no trace.
        whole: `[n, H]`, the decay from before a tile to its end.
    """

    def __init__(self, slab: Slab, dt: Tensor, A: Tensor):
        self.dt = slab.take(dt)
        if slab.valid is not None:
            self.dt = self.dt.masked_fill(~slab.valid[..., None], 0)
        log_decays = self.dt.double().transpose(1, 2) * (A.double() * LOG2_E)[:, None]
        self._a = log_decays.cumsum(2)  # [n, H, q]
        self._dtype = dt.dtype
        self.whole = self._factor(self._a[..., -1])

    def _factor(self, log_decay: Tensor) -> Tensor:
        return torch.exp2(log_decay.to(self._dtype))

    def from_start(self) -> Tensor:
        """`[n, q, H]`: from before the tile to each token."""
        return self._factor(self._a).transpose(1, 2)

    def to_end(self) -> Tensor:
        """`[n, q, H]`: from each token to the end of the tile."""
        return self._factor(self._a[..., -1:] - self._a).transpose(1, 2)

    def between(self, out: Tensor) -> Tensor:
        """`[n, H, q, q]`, written to `out`: from token j to token i for j <= i, 0 elsewhere."""
        # The fp64 difference from two narrow halves: the coarse ones cancel first.
        coarse = self._a.to(self._dtype)
        fine = (self._a - coarse).to(self._dtype)
        torch.sub(coarse[..., :, None], coarse[..., None, :], out=out)
        out.add_(fine[..., :, None]).sub_(fine[..., None, :])
        # For j > i the difference is positive and may be large: it is taken out before it becomes
        # an infinity, which no 0 can undo.
        q = out.shape[-1]
        future = torch.full((q, q), -math.inf, dtype=out.dtype, device=out.device).triu_(1)
        return out.add_(future).exp2_()


def whole_decays(decays: list[Decays], like: Tensor) -> Tensor:
    """`[C, H, 1, 1]`: from before each tile to its end."""
    if not decays:
        return like.new_empty(0)
    return torch.cat([decay.whole for decay in decays])[..., None, None]


def by_group(array: Tensor, sizes: Sizes) -> Tensor:
    """`[n, q, H, ...]` -> `[n, G, q, R, ...]`, a view."""
    return array.unflatten(2, (sizes.G, sizes.R)).transpose(1, 2)


def shared(slab: Slab, stream: Tensor, out: Tensor) -> Tensor:
    """A stream `[T, G, N]` as `[n*G, q, N]`."""
    part = slab.take(stream).transpose(1, 2)
    return out.view(part.shape).copy_(part).flatten(0, 1)


def add_decayed(states: Tensor, to: Rows, decay: Tensor, of: Rows) -> None:
    """`states[to] += decay * states[of]`, in place."""
    if isinstance(to, slice):
        states[to].addcmul_(decay, take(states, of))
    else:
        states.index_add_(0, to, decay * take(states, of))


def states_product(a: Tensor, b: Tensor, states: Tensor, rows: Rows, work: Workspace) -> None:
    """`states[rows] = a @ b`, `[n*G, R*P, q] @ [n*G, q, N]`: in place if the rows are adjacent."""
    size = (a.shape[0], a.shape[1], b.shape[2])
    if isinstance(rows, slice) and rows.step == 1:
        torch.bmm(a, b, out=states[rows].view(size))
    else:
        product = torch.bmm(a, b, out=work("product", *size))
        states[rows] = product.view(-1, *states.shape[1:])
