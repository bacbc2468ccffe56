"""Projections of a few rows, written as the equation (README.md)."""

import torch
from torch import Tensor

from nemotron_v3.ops.common.low_rank import LowRank
from nemotron_v3.ops.skinny_linear.norm import Norm


def skinny_linear(
    x: Tensor,
    weights: tuple[Tensor, ...],
    biases: tuple[Tensor | None, ...],
    *,
    norm: Norm | None = None,
    residual: Tensor | None = None,
    low_rank: tuple[LowRank | None, ...] | None = None,
    out: Tensor,
    dtype: torch.dtype = torch.float64,
) -> Tensor:
    """`(W + scale b a) (norm x) + bias + residual`, computed in `dtype`."""
    x = x.to(dtype)
    if norm is not None:
        grouped = x.unflatten(1, (-1, norm.group or x.shape[1]))
        mean_square = grouped.square().mean(-1, keepdim=True)
        x = (grouped / (mean_square + norm.eps).sqrt()).flatten(1) * norm.weight.to(dtype)
    parts = []
    updates = low_rank or (None,) * len(weights)
    for weight, bias, update in zip(weights, biases, updates, strict=True):
        part = x @ weight.to(dtype).t()
        if update is not None:
            thin = x @ update.a.to(dtype).t()
            part = part + update.scale * (thin @ update.b.to(dtype).t())
        parts.append(part if bias is None else part + bias.to(dtype))
    y = torch.cat(parts, 1)
    return out.copy_(y if residual is None else y + residual.to(dtype))
