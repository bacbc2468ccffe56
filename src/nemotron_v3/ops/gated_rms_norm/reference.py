"""Gate, then normalise each group of channels by its own root mean square (README.md)."""

import torch
import torch.nn.functional as F
from torch import Tensor


def gated_rms_norm(
    y: Tensor,
    z: Tensor | None,
    weight: Tensor,
    group_size: int,
    eps: float = 1e-5,
    *,
    dtype: torch.dtype = torch.float64,
) -> Tensor:
    """`v = y * silu(z)`, then `weight * v / sqrt(mean_group(v^2) + eps)`.

    Args:
        y: `[T, D]`.
        z: `[T, D]`, the gate; None is a gate of ones.
        weight: `[D]`.
        group_size: channels that share a root mean square; D is a multiple of it.
        eps: added to each mean square.
        dtype: what everything is computed and returned in; float64 is the truth.

    Returns:
        `[T, D]` in `dtype`.
    """
    y, weight = y.to(dtype), weight.to(dtype)
    v = y if z is None else y * F.silu(z.to(dtype))
    groups = v.unflatten(-1, (-1, group_size))
    mean_square = (groups * groups).mean(dim=-1, keepdim=True)
    return weight * (groups / torch.sqrt(mean_square + eps)).flatten(-2)
