"""What processes send each other, with the gradients of it. Only copies travel: sums are made where
they are needed, in the order of the ranks, so that they round alike in every run.

Letters: R processes of a group, n rows of each.
"""

from collections.abc import Sequence
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
    """`gathered`, whose gradient is `summed`."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, group: ProcessGroup) -> Tensor:
        ctx.group = group
        return gathered(x, group)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, dy: Tensor) -> tuple[Tensor, None]:
        return summed(dy, ctx.group), None


class Sum(torch.autograd.Function):
    """`summed`, whose gradient is `gathered`."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, group: ProcessGroup) -> Tensor:
        ctx.group = group
        return summed(x, group)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, dy: Tensor) -> tuple[Tensor, None]:
        return gathered(dy, ctx.group), None


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
