"""Each token goes once to every process that has experts of it, and its sums come back.

Letters: R processes of the group, T tokens of this one, N rows that it sends (a token once for each
process that it goes to), K choices a token, X width the experts see.
"""

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable
from torch.distributed import ProcessGroup

from nemotron_v3.layers.moe.dispatcher import Dispatched, Experts
from nemotron_v3.layers.moe.router import made_once
from nemotron_v3.parallel.collectives import Exchange, exchanged


@dataclass(frozen=True)
class Sending:
    """Who gets which tokens.

    Attributes:
        sent, received: how many rows go to each process, and come from it.
        order: `[N]`, the token of each row that is sent, by process and then by token.
        place: `[R, T]`, the row of each token among those, N where it does not go there.
    """

    sent: list[int]
    received: list[int]
    order: Tensor
    place: Tensor


class AllToAllDispatcher:
    """For many processes, where most tokens have no expert on most of them.

    How many rows travel depends on the routing, so the host waits once a layer for its device; a
    recomputation knows already. Sums are made in the order of the ranks, in fp32 or wider: two runs
    are equal, bit for bit.

    Args:
        group: the processes that the experts are spread over, in the order of their experts.
        each: experts of a process.
    """

    def __init__(self, group: ProcessGroup, each: int):
        self.group, self.each = group, each

    def dispatch(self, x: Tensor, indices: Tensor, weights: Tensor) -> tuple[Dispatched, Sending]:
        owner = indices // self.each  # [T, K]
        goes = torch.zeros(len(x), self.group.size(), dtype=torch.bool, device=x.device)
        goes = goes.scatter_(1, owner, torch.ones_like(owner, dtype=torch.bool)).t()  # [R, T]
        sent, received = made_once((self, "counts"), lambda: self._counts(goes))
        to = _sending(goes, sent, received)
        # The process that each row goes to; choices of another one's experts are not there.
        rank = torch.arange(len(sent), device=x.device).repeat_interleave(
            torch.tensor(sent, device=x.device), output_size=sum(sent)
        )[:, None]
        numbers = indices.index_select(0, to.order) - rank * self.each
        there = owner.index_select(0, to.order) == rank
        numbers = numbers.where(there, self.each).to(torch.int32)
        numbers = exchanged(numbers, self.group, sent, received).to(torch.int64)
        x, weights = (
            Exchange.apply(Rows.apply(t, to.order, to.place), self.group, sent, received)
            for t in (x, weights)
        )
        return Dispatched(x, numbers, weights), to

    def compute(self, dispatched: Dispatched, experts: Experts) -> Tensor:
        return experts(*dispatched)

    def combine(self, y: Tensor, metadata: Sending) -> Tensor:
        y = Exchange.apply(y, self.group, metadata.received, metadata.sent)
        return Placed.apply(y, metadata.order, metadata.place)

    def _counts(self, goes: Tensor) -> tuple[list[int], list[int]]:
        mine = goes.sum(1)
        sent, received = torch.stack([mine, exchanged(mine, self.group)]).tolist()
        return sent, received


def _sending(goes: Tensor, sent: list[int], received: list[int]) -> Sending:
    """From who gets which token, `[R, T]` bool."""
    (R, T), rows = goes.shape, sum(sent)
    flat = goes.flatten()
    place = torch.where(flat, flat.cumsum(0) - 1, rows)
    token = torch.arange(T, device=goes.device).repeat(R)
    # What goes nowhere is written behind the rows, in no order that matters.
    order = token.new_empty(rows + 1).scatter_(0, place, token)[:rows]
    return Sending(sent, received, order, place.view(R, T))


def _placed(rows: Tensor, place: Tensor) -> Tensor:
    """`[N, ...]` -> `[T, ...]`: the sum of each token's rows, in the order of the processes."""
    N = len(rows)
    total = rows.new_zeros(place.shape[1], *rows.shape[1:], dtype=_wide(rows))
    for where in place.unbind(0) if N else ():
        found = rows.index_select(0, where.clamp(max=N - 1))
        total += found.where((where < N)[:, None], 0)
    return total.to(rows.dtype)


def _wide(rows: Tensor) -> torch.dtype:
    return torch.promote_types(rows.dtype, torch.float32)


class Rows(torch.autograd.Function):
    """`[T, ...]` -> `[N, ...]`, the tokens of `order`; its gradient is `Placed`."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, order: Tensor, place: Tensor) -> Tensor:
        ctx.save_for_backward(place)
        return x.index_select(0, order)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, dy: Tensor) -> tuple[Tensor, None, None]:
        (place,) = ctx.saved_tensors
        return _placed(dy, place), None, None


class Placed(torch.autograd.Function):
    """`[N, ...]` -> `[T, ...]`, each token's sum over its rows; its gradient is `Rows`."""

    @staticmethod
    def forward(ctx: Any, y: Tensor, order: Tensor, place: Tensor) -> Tensor:
        ctx.save_for_backward(order)
        return _placed(y, place)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, dy: Tensor) -> tuple[Tensor, None, None]:
        (order,) = ctx.saved_tensors
        return dy.index_select(0, order), None, None
