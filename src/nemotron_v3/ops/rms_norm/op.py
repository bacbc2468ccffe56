"""The public RMS normalisation."""

from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from nemotron_v3.ops.common.host import refuse_dtypes
from nemotron_v3.ops.common.selfcheck import Check
from nemotron_v3.ops.registry import Op
from nemotron_v3.ops.rms_norm import portable, reference


def _kernels() -> Callable[..., Tensor]:
    from nemotron_v3.ops.gated_rms_norm.kernels import rms_norm

    return rms_norm


def _refusal(dtypes: Sequence[torch.dtype], width: int) -> str | None:
    if width > 65536:
        return f"a row must fit into one program, and has {width} columns"
    return refuse_dtypes(dtypes)


_OP = Op(
    "rms_norm",
    reference=reference.rms_norm,
    portable=portable.rms_norm,
    kernels=_kernels,
    refuse=_refusal,
    check=Check("odd-width"),
)


@_OP.public
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
    if x.shape[-1:] != weight.shape:
        raise ValueError(
            f"width {x.shape[-1:].numel()} does not match the norm's {weight.shape[0]}: give "
            f"hidden states of shape (..., {weight.shape[0]})"
        )
    run = _OP.pick(impl, (x, weight), weight.shape[0])
    out, dtype = run(x, weight, eps, out_dtype), out_dtype or x.dtype
    return out if out.dtype == dtype else out.to(dtype)
