"""What processes send each other, with the gradients of it. Only copies travel: sums are made where
they are needed, in the order of the ranks, so that they round alike in every run.

Letters: R processes of a group, n rows of each.
"""

from collections.abc import Callable, Sequence
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor
from torch.autograd.function import once_differentiable
from torch.distributed import ProcessGroup
from torch.profiler import record_function

# torch 2.13 calls it otherwise, and warns of the older name.
_all_gather = getattr(dist, "all_gather_single", None) or dist.all_gather_into_tensor


def gathered(x: Tensor, group: ProcessGroup) -> Tensor:
    """`[n, ...]` of each process -> `[R n, ...]` on all, in the order of the ranks."""
    out = x.new_empty(x.shape[0] * group.size(), *x.shape[1:])
    if out.numel():
        with record_function("nemotron_v3.parallel: gather"):
            _all_gather(out, x.contiguous(), group=group)
    return out


def exchanged(
    x: Tensor,
    group: ProcessGroup,
    sent: Sequence[int] | None = None,
    received: Sequence[int] | None = None,
) -> Tensor:
    """Rows to every process, `sent[r]` of them to rank r; the rows from all, by rank.

    Without counts every process gets as many.
    """
    rows = x.shape[0] if received is None else sum(received)
    out = x.new_empty(rows, *x.shape[1:])
    # With counts others may have something to send where this process has not.
    if out.numel() or received is not None:
        splits = (None, None) if received is None else (list(received), list(sent or ()))
        with record_function("nemotron_v3.parallel: exchange"):
            dist.all_to_all_single(out, x.contiguous(), *splits, group=group)
    return out


def summed(x: Tensor, group: ProcessGroup) -> Tensor:
    """`[R n, ...]`, n rows for each process -> `[n, ...]`: the sum of what all have for this one.

    It is made in fp32 or wider and rounded once.
    """
    R = group.size()
    return exchanged(x, group).unflatten(0, (R, -1)).sum(0) if x.numel() else x[: x.shape[0] // R]


class Gather(torch.autograd.Function):
    """`gathered`, whose gradient is `summed`, at once: where nothing is computed meanwhile."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, group: ProcessGroup) -> Tensor:
        ctx.group = group
        return gathered(x, group)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, dy: Tensor) -> tuple[Tensor, None]:
        return summed(dy, ctx.group), None


def gather(x: Tensor, group: ProcessGroup) -> Callable[[], Tensor]:
    """`gathered`, begun: what is returned waits for it. Its gradient is `summed`.

    What is computed between the two calls runs meanwhile, and so does its backward pass while the
    gradient travels.
    """
    return _begin(x, group, False)


def sums_of(x: Tensor, group: ProcessGroup) -> Callable[[], Tensor]:
    """`[R n, ...]`, n rows for each process -> `[n, ...]`, begun: the sum of what all have for this
    one, in fp32 or wider and rounded once. Its gradient is `gathered`."""
    return _begin(x, group, True)


def _begin(x: Tensor, group: ProcessGroup, sums: bool) -> Callable[[], Tensor]:
    under_way = _UnderWay(group)
    arriving = _Begun.apply(x, under_way, sums)
    return lambda: _Done.apply(arriving, under_way, sums)


class _UnderWay:
    """A collective that was begun, in one direction or the other."""

    def __init__(self, group: ProcessGroup):
        self.group = group
        self.work: Any = None

    def send(self, x: Tensor, exchange: bool) -> Tensor:
        """Where what comes will be, once `wait` has returned."""
        rows = x.shape[0] * (1 if exchange else self.group.size())
        out = x.new_empty(rows, *x.shape[1:])
        if not out.numel():
            return out
        collective, name = _all_gather, "gather"
        if exchange:
            collective, name = dist.all_to_all_single, "exchange"
        with record_function(f"nemotron_v3.parallel: {name}"):
            self.work = collective(out, x.contiguous(), group=self.group, async_op=True)
        return out

    def wait(self) -> None:
        work, self.work = self.work, None
        if work is not None:
            work.wait()

    def sum(self, parts: Tensor) -> Tensor:
        """`[R n, ...]` -> `[n, ...]`, in the order of the ranks."""
        return parts.unflatten(0, (self.group.size(), -1)).sum(0) if parts.numel() else parts[:0]


class _Begun(torch.autograd.Function):
    """Sends rows; the gradient of what comes has been sent by `_Done` and is waited for here."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, under_way: _UnderWay, sums: bool) -> Tensor:
        ctx.under_way, ctx.sums = under_way, sums
        return under_way.send(x, exchange=sums)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, arriving: Tensor) -> tuple[Tensor, None, None]:
        ctx.under_way.wait()
        return (arriving if ctx.sums else ctx.under_way.sum(arriving)), None, None


class _Done(torch.autograd.Function):
    """Waits for rows; sends their gradient back."""

    @staticmethod
    def forward(ctx: Any, arriving: Tensor, under_way: _UnderWay, sums: bool) -> Tensor:
        ctx.under_way, ctx.sums = under_way, sums
        under_way.wait()
        return under_way.sum(arriving) if sums else arriving.view_as(arriving)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, dy: Tensor) -> tuple[Tensor, None, None]:
        return ctx.under_way.send(dy, exchange=not ctx.sums), None, None


class Exchange(torch.autograd.Function):
    """`exchanged` with counts, whose gradient is the way back."""

    @staticmethod
    def forward(
        ctx: Any, x: Tensor, group: ProcessGroup, sent: Sequence[int], received: Sequence[int]
    ) -> Tensor:
        ctx.back = group, received, sent
        return exchanged(x, group, sent, received)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, dy: Tensor) -> tuple[Tensor, None, None, None]:
        return exchanged(dy, *ctx.back), None, None, None
