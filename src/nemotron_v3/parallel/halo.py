"""The inputs of a convolution that lie in other processes.

Letters: J segments, W taps, C convolved channels, n_pieces pieces of documents of a call.

Each segment gives the last W - 1 inputs of its last document. A document that goes on takes as many
as there are of its own, from one segment or, where those are short, from several.
"""

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable
from torch.distributed import ProcessGroup

from nemotron_v3.layout.modes import on_device
from nemotron_v3.parallel.collectives import gathered, summed
from nemotron_v3.parallel.shares import Shares


class Halo:
    """Of one mixer in one pass; what comes in is kept, so that a block that is computed again asks
    nobody.

    Args:
        shares: who has which segment.
        group: the processes.
        first, last: for each own segment the numbers of its first and its last piece in the call.
        lengths: of the pieces of the call.
        taps: W.
    """

    def __init__(
        self,
        shares: Shares,
        group: ProcessGroup,
        first: Sequence[int],
        last: Sequence[int],
        lengths: Sequence[int],
        taps: int,
    ):
        self.group, self.taps, self.pieces = group, taps, len(lengths)
        self.kept: Tensor | None = None
        self._rows = len(shares.own) * (taps - 1)
        self._sent = _sent(last, lengths, taps - 1)
        self._taken = _taken(shares, first, taps)

    def states(self, xBC: Tensor) -> Tensor:
        """`[T, C]`, the inputs of the call -> its conv states `[n_pieces, C, W]`."""
        device = xBC.device
        to, of = (on_device(places, device) for places in self._sent)
        tails = xBC.new_zeros(self._rows, xBC.shape[1]).index_copy(0, to, xBC.index_select(0, of))
        tails = _Gathered.apply(tails, self)  # [J (W - 1), C]
        to, of = (on_device(places, device) for places in self._taken)
        states = xBC.new_zeros(self.pieces * self.taps, xBC.shape[1])
        states = states.index_copy(0, to, tails.index_select(0, of))
        return states.unflatten(0, (self.pieces, self.taps)).transpose(1, 2).contiguous()


def _sent(last: Sequence[int], lengths: Sequence[int], width: int) -> tuple[list[int], list[int]]:
    """Rows of the tails that are filled, and of which tokens of the call."""
    to, of = [], []
    for i, piece in enumerate(last):
        end = sum(lengths[: piece + 1])
        count = min(width, lengths[piece])
        to += range((i + 1) * width - count, (i + 1) * width)
        of += range(end - count, end)
    return to, of


def _taken(shares: Shares, first: Sequence[int], taps: int) -> tuple[list[int], list[int]]:
    """Columns of the states that are filled, by piece, and of which rows of all tails."""
    width, own = taps - 1, len(shares.own)
    seen = [0] * shares.size
    rows = []  # where the tail of each segment begins
    for share in shares.all:
        rows.append((share.rank * own + seen[share.rank]) * width)
        seen[share.rank] += 1
    to, of = [], []
    for piece, j in zip(first, shares.own, strict=True):
        share = shares.all[j]
        for back in range(1, min(width, share.before) + 1):
            segment, _ = shares.place(share.start - back)
            to.append(piece * taps + taps - back)
            of.append(rows[segment] + width - (shares.all[segment].end - (share.start - back)))
    return to, of


class _Gathered(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, tails: Tensor, halo: Halo) -> Tensor:
        ctx.group = halo.group
        if halo.kept is None:
            halo.kept = gathered(tails, halo.group)
        return halo.kept.clone()

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, dtails: Tensor) -> tuple[Tensor, None]:
        return summed(dtails, ctx.group), None
