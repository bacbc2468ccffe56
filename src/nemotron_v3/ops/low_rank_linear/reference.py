"""A linear layer with a low-rank update, one token after another. I inputs, O outputs, r rank."""

import torch
from torch import Tensor


def low_rank_linear(
    x: Tensor,
    weight: Tensor,
    a: Tensor,
    b: Tensor,
    bias: Tensor | None = None,
    *,
    scale: float = 1.0,
    dtype: torch.dtype = torch.float64,
) -> Tensor:
    """`weight x + scale b (a x) + bias`.

    Args:
        x: `[..., I]`.
        weight: `[O, I]`.
        a: `[r, I]`.
        b: `[O, r]`.
        bias: `[O]`, or None.
        scale: of the update.
        dtype: what everything is computed and returned in; float64 is the truth.

    Returns:
        `[..., O]` in `dtype`.
    """
    x, weight, a, b = (t.to(dtype) for t in (x, weight, a, b))
    rows = [weight @ x_t + scale * (b @ (a @ x_t)) for x_t in x.flatten(0, -2).unbind(0)]
    y = torch.stack(rows) if rows else x.new_zeros(0, weight.shape[0])
    y = y if bias is None else y + bias.to(dtype)
    return y.unflatten(0, x.shape[:-1])
