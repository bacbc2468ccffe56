"""Gated, grouped RMS normalisation in plain PyTorch.

Letters: T tokens, D width; v = y silu(z), r = 1 / rms of its group. The backward pass keeps the
inputs and computes the rest again (README.md, 'How the portable form computes the backward').
"""

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.autograd.function import once_differentiable

from nemotron_v3.ops.common.blocks import Workspace, at_once, put_rows, row_blocks, rows_for
from nemotron_v3.ops.common.precision import WIDE


def gated_rms_norm(
    y: Tensor, z: Tensor | None, weight: Tensor, group_size: int, eps: float = 1e-5
) -> Tensor:
    if at_once(y, z, weight):
        v = y.to(WIDE[y.dtype])
        if z is not None:
            v = F.silu(z.to(v.dtype)).mul_(v)
        n = v.unflatten(-1, (-1, group_size))
        n = (n * _inverse_rms(n, eps)).flatten(-2)
        return n.mul_(weight.to(v.dtype)).to(y.dtype)
    width = weight.shape[0]
    gate = None if z is None else z.reshape(-1, width)
    return _GatedNorm.apply(y.reshape(-1, width), gate, weight, group_size, eps).view(y.shape)


class _GatedNorm(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, y: Tensor, z: Tensor | None, weight: Tensor, group_size: int, eps: float
    ) -> Tensor:
        out = normalise(y, z, weight, group_size, eps)
        ctx.save_for_backward(y, z, weight)
        ctx.group_size, ctx.eps = group_size, eps
        return out

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, dout: Tensor) -> tuple[Tensor | None, ...]:
        y, z, weight = ctx.saved_tensors
        dy = torch.empty_like(y, memory_format=torch.contiguous_format)
        dz = None if z is None else torch.empty_like(dy)
        dweight = backward(y, z, weight, ctx.group_size, ctx.eps, dout, dy, dz)
        return dy, dz, dweight, None, None


def normalise(y: Tensor, z: Tensor | None, weight: Tensor, group_size: int, eps: float) -> Tensor:
    """The forward pass on `[T, D]`, outside autograd."""
    dtype = WIDE[y.dtype]
    out = torch.empty_like(y, memory_format=torch.contiguous_format)
    work, weight = Workspace(y, dtype), weight.to(dtype)
    for start, end in row_blocks(y.shape[0], y.shape[1], y.device):
        y_rows = y[start:end].to(dtype)
        v = y_rows if z is None else _silu(z[start:end].to(dtype), work).mul_(y_rows)
        groups = v.unflatten(1, (-1, group_size))
        n = torch.mul(groups, _inverse_rms(groups, eps), out=work("n", *groups.shape)).flatten(1)
        put_rows(out, start, torch.mul(n, weight, out=rows_for(out, start, end, dtype)))
    return out


def backward(
    y: Tensor,
    z: Tensor | None,
    weight: Tensor,
    group_size: int,
    eps: float,
    dout: Tensor,
    dy: Tensor,
    dz: Tensor | None,
) -> Tensor:
    """The gradient of the weight; those of y and z are written to `dy` and `dz`."""
    dtype, given = WIDE[y.dtype], weight.dtype
    dweight = weight.new_zeros(weight.shape, dtype=dtype)
    work, weight = Workspace(y, dtype), weight.to(dtype)
    for start, end in row_blocks(y.shape[0], y.shape[1], y.device):
        y_rows = y[start:end].to(dtype)
        dn = dout[start:end].to(dtype)
        shape = y_rows.shape
        v = y_rows
        if z is not None:
            z_rows = z[start:end].to(dtype)
            gate = _silu(z_rows, work)
            v = torch.mul(gate, y_rows, out=work("v", *shape))

        groups = v.unflatten(1, (-1, group_size))
        r = _inverse_rms(groups, eps)
        scaled = torch.mul(dn.view_as(groups), r, out=work("scaled", *groups.shape)).view(shape)
        product = torch.mul(scaled, v, out=work("product", *shape))
        dweight += product.sum(0)
        # dv = dn - r^2 v mean(dn v), with the weight and r inside dn
        mean = product.mul_(weight).unflatten(1, (-1, group_size)).mean(-1, keepdim=True)
        dv = scaled.mul_(weight).view_as(groups)
        dv = dv.addcmul_(groups, mean.mul_(r).mul_(r), value=-1).view(shape)
        target = rows_for(dy, start, end, dtype)
        if z is None or dz is None:
            put_rows(dy, start, target.copy_(dv))
        else:
            put_rows(dy, start, torch.mul(dv, gate, out=target))
            target = rows_for(dz, start, end, dtype)
            torch.ops.aten.silu_backward(dv.mul_(y_rows), z_rows, grad_input=target)
            put_rows(dz, start, target)
    return dweight.to(given)


def _silu(z: Tensor, work: Workspace) -> Tensor:
    return torch.ops.aten.silu.out(z, out=work("gate", *z.shape))


def _inverse_rms(groups: Tensor, eps: float) -> Tensor:
    """`1 / sqrt(mean(v^2) + eps)` over the last dimension, which stays."""
    squares = torch.linalg.vecdot(groups, groups)[..., None]
    return squares.div_(groups.shape[-1]).add_(eps).rsqrt_()
