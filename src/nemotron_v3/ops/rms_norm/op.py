"""The public RMS normalisation."""

import torch
from torch import Tensor

from nemotron_v3.ops._dispatch import pick, without_autocast
from nemotron_v3.ops.rms_norm import portable, reference


@without_autocast
def rms_norm(
    x: Tensor,
    weight: Tensor,
    eps: float = 1e-5,
    out_dtype: torch.dtype | None = None,
    *,
    impl: str = "auto",
) -> Tensor:
    """`weight * x / sqrt(mean(x^2) + eps)` over the last dimension (Zhang & Sennrich 2019).

    Args:
        x: `[..., D]`.
        weight: `[D]`.
        out_dtype: dtype of the result, by default `x`'s. Statistics and the product with the weight
            are fp32 or wider; there is one cast, at the end.
        impl: see `nemotron_v3.ops`.

    Returns:
        `[..., D]` in `out_dtype`.

    Raises:
        ValueError: the width of `x` is not `weight`'s.
    """
    if x.shape[-1] != weight.shape[0]:
        raise ValueError(
            f"width {x.shape[-1]} does not match the norm's {weight.shape[0]}: give hidden states "
            f"of shape (..., {weight.shape[0]})"
        )
    run = pick("rms_norm", impl, reference=reference.rms_norm, portable=portable.rms_norm)
    return run(x, weight, eps, out_dtype)
