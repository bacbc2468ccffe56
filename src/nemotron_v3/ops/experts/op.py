"""The public routed experts."""

from collections.abc import Callable

import torch
from torch import Tensor

from nemotron_v3.ops._dispatch import Kernels, autocast_matmul_dtype, pick, without_autocast
from nemotron_v3.ops._empty import of_no_tokens
from nemotron_v3.ops._triton import DTYPES, refuse_dtypes
from nemotron_v3.ops.experts import portable, reference
from nemotron_v3.ops.relu2.op import relu2

__all__ = ["experts", "relu2"]

MOST_EXPERTS, MOST_ROWS = 2048, 2**26  # of the kernels


def experts(
    x: Tensor,
    indices: Tensor,
    weights: Tensor,
    up_proj: Tensor,
    down_proj: Tensor,
    *,
    impl: str = "auto",
) -> Tensor:
    """`y_t = sum_k weights[t, k] * down[e] relu(up[e] x_t)^2` with `e = indices[t, k]`.

    Letters: T packed tokens, K choices a token, E experts, X width, F expert width.

    Args:
        x: `[T, X]`; under autocast it and the matrices take part in the autocast dtype.
        indices: `[T, K]` int64 in [0, E).
        weights: `[T, K]`.
        up_proj: `[E, F, X]`. down_proj: `[E, X, F]`.
        impl: see `nemotron_v3.ops`.

    Returns:
        `[T, X]` in the matmuls' dtype; the sum over choices is fp32 or wider.

    Raises:
        ValueError: shapes that do not fit.
    """
    E, F, X = up_proj.shape
    if x.dim() != 2 or x.shape[1] != X or tuple(down_proj.shape) != (E, X, F):
        raise ValueError(
            f"x {tuple(x.shape)}, up_proj {tuple(up_proj.shape)} and down_proj "
            f"{tuple(down_proj.shape)} do not fit: (tokens, X), (E, F, X), (E, X, F)"
        )
    if indices.shape != weights.shape or indices.shape[:1] != x.shape[:1]:
        raise ValueError(
            f"indices {tuple(indices.shape)} and weights {tuple(weights.shape)} must both be "
            f"({x.shape[0]}, choices)"
        )
    dtype = autocast_matmul_dtype(x)
    if not x.shape[0]:
        return of_no_tokens(x.to(dtype), weights, up_proj, down_proj)
    run = pick(
        "experts",
        impl,
        reference=reference.experts,
        portable=portable.experts,
        triton=Kernels(_kernels, x.device, refuse_experts(dtype, weights, E)),
    )
    y = without_autocast(run)(x.to(dtype), indices, weights, up_proj.to(dtype), down_proj.to(dtype))
    return y.to(dtype)


def refuse_experts(dtype: torch.dtype, weights: Tensor, experts: int) -> str | None:
    """Why the kernels cannot take these tensors, or None."""
    rows = weights.numel()
    if experts > MOST_EXPERTS:
        return f"it counts the rows of at most {MOST_EXPERTS} experts, and there are {experts}"
    if rows > MOST_ROWS:
        return f"it numbers at most {MOST_ROWS} routed rows, and there are {rows}"
    if dtype not in DTYPES:
        return f"it computes in fp32, and {dtype} is asked for"
    return refuse_dtypes(weights)


def _kernels() -> Callable:
    from nemotron_v3.ops.experts.kernels import experts

    return experts
