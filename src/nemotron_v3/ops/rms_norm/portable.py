"""RMS normalisation in plain PyTorch. Letters: T tokens, D width; r = 1 / rms, n = r x.

The backward pass keeps the input and computes the rest again (README.md, 'How the portable form
computes the backward').
"""

from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from nemotron_v3.ops.common.blocks import Workspace, at_once, put_rows, row_blocks, rows_for
from nemotron_v3.ops.common.precision import WIDE


def rms_norm(
    x: Tensor, weight: Tensor, eps: float = 1e-5, out_dtype: torch.dtype | None = None
) -> Tensor:
    if at_once(x, weight):
        x_wide = x.to(WIDE[x.dtype])
        n = (x_wide * _inverse_rms(x_wide, eps)).mul_(weight.to(x_wide.dtype))
        return n.to(out_dtype or x.dtype)
    rows = x.reshape(-1, weight.shape[0])
    return _Norm.apply(rows, weight, eps, out_dtype or x.dtype).view(x.shape)


class _Norm(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor, eps: float, out_dtype: torch.dtype) -> Tensor:
        dtype = WIDE[x.dtype]
        out = x.new_empty(x.shape, dtype=out_dtype)
        for start, end in row_blocks(x.shape[0], x.shape[1], x.device):
            x_rows = x[start:end].to(dtype)
            n = rows_for(out, start, end, dtype)
            torch.mul(x_rows, _inverse_rms(x_rows, eps), out=n)
            put_rows(out, start, n.mul_(weight.to(dtype)))
        ctx.save_for_backward(x, weight)
        ctx.eps = eps
        return out

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, dout: Tensor) -> tuple[Tensor | None, ...]:
        x, weight = ctx.saved_tensors
        dtype = WIDE[x.dtype]
        dx = torch.empty_like(x, memory_format=torch.contiguous_format)
        dweight = weight.new_zeros(weight.shape, dtype=dtype)
        work = Workspace(x, dtype)
        for start, end in row_blocks(x.shape[0], x.shape[1], x.device):
            x_rows, dn = x[start:end].to(dtype), dout[start:end].to(dtype)
            r = _inverse_rms(x_rows, ctx.eps)
            n = torch.mul(x_rows, r, out=work("n", *dn.shape))
            product = torch.mul(dn, n, out=work("product", *dn.shape))
            dweight += product.sum(0)
            # dx = r (dn - n mean(dn n)), with the weight inside dn
            mean = product.mul_(weight.to(dtype)).mean(-1, keepdim=True)
            target = rows_for(dx, start, end, dtype)
            torch.mul(dn, weight.to(dtype), out=target)
            put_rows(dx, start, target.addcmul_(n, mean, value=-1).mul_(r))
        return dx, dweight.to(weight.dtype), None, None


def _inverse_rms(x: Tensor, eps: float) -> Tensor:
    """`1 / sqrt(mean(x^2) + eps)` over the last dimension, which stays."""
    squares = torch.linalg.vecdot(x, x)[..., None]
    return squares.div_(x.shape[-1]).add_(eps).rsqrt_()
