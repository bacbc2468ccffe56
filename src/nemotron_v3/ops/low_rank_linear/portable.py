"""A linear layer with a low-rank update in plain PyTorch: five products, or eight with gradients.

Letters: T tokens, I inputs, O outputs, r rank.
"""

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.autograd.function import once_differentiable


def low_rank_linear(
    x: Tensor,
    weight: Tensor,
    a: Tensor,
    b: Tensor,
    bias: Tensor | None = None,
    *,
    scale: float = 1.0,
) -> Tensor:
    if torch.compiler.is_compiling():  # which fuses what is between the products by itself
        return F.linear(x, weight, bias) + scale * F.linear(F.linear(x, a), b)
    y = _LowRankLinear.apply(x.reshape(-1, x.shape[-1]), weight, a, b, bias, scale)
    return y.view(*x.shape[:-1], y.shape[-1])


class _LowRankLinear(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        x: Tensor,
        weight: Tensor,
        a: Tensor,
        b: Tensor,
        bias: Tensor | None,
        scale: float,
    ) -> Tensor:
        h = x @ a.t()  # [T, r]
        ctx.save_for_backward(x, weight, a, b, h)
        ctx.scale = scale
        return F.linear(x, weight, bias).addmm_(h, b.t(), alpha=scale)  # [T, O]

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, dy: Tensor) -> tuple[Tensor | None, ...]:
        x, weight, a, b, h = ctx.saved_tensors
        of_x, of_weight, of_a, of_b, of_bias, _ = ctx.needs_input_grad
        dx = da = None
        if of_x or of_a:
            dh = (dy @ b).mul_(ctx.scale)  # [T, r]
            if of_x:
                dx = (dy @ weight).addmm_(dh, a)
            if of_a:
                da = dh.t() @ x
        dweight = dy.t() @ x if of_weight else None
        db = (dy.t() @ h).mul_(ctx.scale) if of_b else None
        return dx, dweight, da, db, dy.sum(0) if of_bias else None, None
