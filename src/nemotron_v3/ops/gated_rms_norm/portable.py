"""Gated, grouped RMS normalisation in plain PyTorch.

Letters: T tokens, D width; v = y silu(z), and with r = 1 / rms of its group, n = r v. The backward
pass keeps the inputs and computes the rest again (README.md, 'How the portable form computes the
backward').
"""

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.autograd.function import once_differentiable

from nemotron_v3.ops._blocks import block_elements, row_blocks
from nemotron_v3.ops._dispatch import needs_grad, wide


def gated_rms_norm(
    y: Tensor, z: Tensor | None, weight: Tensor, group_size: int, eps: float = 1e-5
) -> Tensor:
    if not needs_grad(y, z, weight) and y.numel() <= block_elements(y.device):
        v = y.to(wide(y.dtype))
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
        dtype = wide(y.dtype)
        out = torch.empty_like(y, memory_format=torch.contiguous_format)
        for start, end in row_blocks(*y.shape, y.device):
            rows = slice(start, end)
            v = y[rows].to(dtype)
            if z is not None:
                v = F.silu(z[rows].to(dtype)).mul_(v)
            n = v.unflatten(1, (-1, group_size))
            n = (n * _inverse_rms(n, eps)).flatten(1)
            out[rows] = n.mul_(weight.to(dtype))
        ctx.save_for_backward(y, z, weight)
        ctx.group_size, ctx.eps = group_size, eps
        return out

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, dout: Tensor) -> tuple[Tensor | None, ...]:
        y, z, weight = ctx.saved_tensors
        dtype = wide(y.dtype)
        dy = torch.empty_like(y, memory_format=torch.contiguous_format)
        dz = None if z is None else torch.empty_like(dy)
        dweight = weight.new_zeros(weight.shape, dtype=dtype)
        for start, end in row_blocks(*y.shape, y.device):
            rows = slice(start, end)
            y_rows = y[rows].to(dtype)
            z_rows = None if z is None else z[rows].to(dtype)
            gate = None if z is None else F.silu(z_rows)
            v = y_rows if z is None else gate * y_rows
            dn = dout[rows].to(dtype)

            groups = v.unflatten(1, (-1, ctx.group_size))
            r = _inverse_rms(groups, ctx.eps)
            n = groups * r
            product = dn * n.flatten(1)
            dweight += product.sum(0)
            # dv = r (dn - n mean(dn n)), with the weight inside dn
            mean = product.mul_(weight.to(dtype)).unflatten(1, (-1, ctx.group_size))
            mean = mean.mean(-1, keepdim=True)
            dv = torch.mul(dn, weight.to(dtype), out=product).view_as(n)
            dv = dv.addcmul_(n, mean, value=-1).mul_(r).flatten(1)
            if z is None:
                dy[rows] = dv
            else:
                torch.mul(dv, gate, out=gate)
                dy[rows] = gate
                dz[rows] = torch.ops.aten.silu_backward(dv.mul_(y_rows), z_rows)
        return dy, dz, dweight.to(weight.dtype), None, None


def _inverse_rms(groups: Tensor, eps: float) -> Tensor:
    """`1 / sqrt(mean(v^2) + eps)` over the last dimension, which stays."""
    squares = torch.linalg.vecdot(groups, groups)[..., None]
    return squares.div_(groups.shape[-1]).add_(eps).rsqrt_()
