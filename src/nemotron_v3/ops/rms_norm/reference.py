"""Root-mean-square normalisation, as its equation reads (README.md)."""

import torch
from torch import Tensor


def rms_norm(
    x: Tensor,
    weight: Tensor,
    eps: float = 1e-5,
    out_dtype: torch.dtype | None = None,
    *,
    dtype: torch.dtype = torch.float64,
) -> Tensor:
    """`y = weight * x / sqrt(mean(x^2) + eps)`, the mean over the last dimension.

    Args:
        x: `[T, D]`.
        weight: `[D]`.
        eps: added to the mean square.
        out_dtype: no effect: the truth is not rounded to the dtype in which a result is stored.
        dtype: what everything is computed and returned in, whatever the inputs' dtypes; float64
            is the truth, another dtype is what plain PyTorch makes of these equations.

    Returns:
        `[T, D]` in `dtype`.
    """
    x, weight = x.to(dtype), weight.to(dtype)
    mean_square = (x * x).mean(dim=-1, keepdim=True)
    return weight * (x / torch.sqrt(mean_square + eps))
