"""The routed experts, one token and one expert at a time (README.md).

T packed tokens, K experts a token, E experts, F expert width, X width of the experts' input.
"""

import torch
from torch import Tensor

from nemotron_v3.ops.common.no_tokens import of_no_tokens


def experts(
    x: Tensor,
    indices: Tensor,
    weights: Tensor,
    up_proj: Tensor,
    down_proj: Tensor,
    *,
    dtype: torch.dtype = torch.float64,
) -> Tensor:
    """`y_t = sum_k weights[t, k] down_proj[e] relu(up_proj[e] x_t)^2` with `e = indices[t, k]`.

    Args:
        x: `[T, X]`.
        indices: `[T, K]` int64; E is an expert that is not here.
        weights: `[T, K]`.
        up_proj: `[E, F, X]`.
        down_proj: `[E, X, F]`.
        dtype: what everything is computed and returned in; float64 is the truth.

    Returns:
        `[T, X]` in `dtype`.
    """
    x, weights = x.to(dtype), weights.to(dtype)
    up, down = up_proj.to(dtype).unbind(0), down_proj.to(dtype).unbind(0)
    outputs = []
    for x_t, w_t, chosen in zip(x.unbind(0), weights.unbind(0), indices.tolist(), strict=True):
        y_t = of_no_tokens(torch.zeros_like(x_t), x_t, w_t, *up, *down)
        for w, e in zip(w_t.unbind(0), chosen, strict=True):
            if e == len(up):
                continue
            hidden = torch.relu(up[e] @ x_t) ** 2  # [F]
            y_t = y_t + w * (down[e] @ hidden)
        outputs.append(y_t)
    return torch.stack(outputs) if outputs else x
