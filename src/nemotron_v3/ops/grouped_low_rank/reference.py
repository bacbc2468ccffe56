"""The routed experts with a low-rank update of each matrix, one token and expert at a time.

T packed tokens, K experts a token, E experts, F expert width, X width of the input, r rank.
"""

import torch
from torch import Tensor

from nemotron_v3.ops.common.no_tokens import of_no_tokens


def grouped_low_rank(
    x: Tensor,
    indices: Tensor,
    weights: Tensor,
    up_proj: Tensor,
    down_proj: Tensor,
    up_a: Tensor,
    up_b: Tensor,
    down_a: Tensor,
    down_b: Tensor,
    *,
    scale: float = 1.0,
    dtype: torch.dtype = torch.float64,
) -> Tensor:
    """`experts` with `up_proj[e] + scale up_b[e] up_a[e]` and `down_proj` likewise.

    Args:
        x: `[T, X]`.
        indices: `[T, K]` int64; E is an expert that is not here.
        weights: `[T, K]`.
        up_proj: `[E, F, X]`. up_a: `[E, r, X]`. up_b: `[E, F, r]`.
        down_proj: `[E, X, F]`. down_a: `[E, r, F]`. down_b: `[E, X, r]`.
        scale: of both updates.
        dtype: what everything is computed and returned in; float64 is the truth.

    Returns:
        `[T, X]` in `dtype`.
    """
    x, weights = x.to(dtype), weights.to(dtype)
    up, a, b = (t.to(dtype).unbind(0) for t in (up_proj, up_a, up_b))
    down, c, d = (t.to(dtype).unbind(0) for t in (down_proj, down_a, down_b))
    outputs = []
    for x_t, w_t, chosen in zip(x.unbind(0), weights.unbind(0), indices.tolist(), strict=True):
        y_t = of_no_tokens(torch.zeros_like(x_t), x_t, w_t, *up, *a, *b, *down, *c, *d)
        for w, e in zip(w_t.unbind(0), chosen, strict=True):
            if e == len(up):
                continue
            hidden = torch.relu(up[e] @ x_t + scale * (b[e] @ (a[e] @ x_t))) ** 2  # [F]
            y_t = y_t + w * (down[e] @ hidden + scale * (d[e] @ (c[e] @ hidden)))
        outputs.append(y_t)
    return torch.stack(outputs) if outputs else x


def merged(weight: Tensor, a: Tensor, b: Tensor, scale: float = 1.0) -> Tensor:
    """`weight[e] + scale b[e] a[e]` in fp64, rounded once to the weight's dtype."""
    return (weight.double() + scale * (b.double() @ a.double())).to(weight.dtype)
