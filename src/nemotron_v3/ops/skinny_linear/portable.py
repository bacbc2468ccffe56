"""Projections of a few rows in plain PyTorch."""

import torch
from torch import Tensor

from nemotron_v3.ops.common.low_rank import LowRank, with_update
from nemotron_v3.ops.common.precision import WIDE
from nemotron_v3.ops.skinny_linear.norm import Norm


def skinny_linear(
    x: Tensor,
    weights: tuple[Tensor, ...],
    biases: tuple[Tensor | None, ...],
    *,
    norm: Norm | None,
    residual: Tensor | None,
    low_rank: tuple[LowRank | None, ...] | None = None,
    out: Tensor,
) -> Tensor:
    kind = weights[0].dtype
    if norm is not None:
        grouped = x.to(WIDE[kind]).unflatten(1, (-1, norm.group or x.shape[1]))
        scale = torch.rsqrt(grouped.square().mean(-1, keepdim=True) + norm.eps)
        x = (grouped * scale).flatten(1) * norm.weight.to(scale.dtype)
    x = x.to(kind)
    parts = [
        with_update(x, torch.nn.functional.linear(x, weight, bias), update)
        for weight, bias, update in zip(
            weights, biases, low_rank or (None,) * len(weights), strict=True
        )
    ]
    y = parts[0] if len(parts) == 1 else torch.cat(parts, 1)
    return out.copy_(y if residual is None else residual + y.to(residual.dtype))
