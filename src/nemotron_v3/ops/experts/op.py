"""The public routed experts."""

from torch import Tensor

from nemotron_v3.ops._dispatch import autocast_matmul_dtype, pick, without_autocast
from nemotron_v3.ops.experts import portable, reference
from nemotron_v3.ops.experts.portable import relu2

__all__ = ["experts", "relu2"]


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
    run = pick("experts", impl, reference=reference.experts, portable=portable.experts)
    dtype = autocast_matmul_dtype(x)
    y = without_autocast(run)(x.to(dtype), indices, weights, up_proj.to(dtype), down_proj.to(dtype))
    return y.to(dtype)
