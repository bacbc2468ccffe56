"""The public routed experts."""

from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from nemotron_v3.ops.common.host import refuse_dtypes
from nemotron_v3.ops.common.no_tokens import of_no_tokens
from nemotron_v3.ops.common.precision import autocast_matmul_dtype
from nemotron_v3.ops.common.selfcheck import Check
from nemotron_v3.ops.experts import portable, reference
from nemotron_v3.ops.registry import Op

MOST_EXPERTS, MOST_ROWS = 2048, 2**26  # of the kernels


def _kernels() -> Callable[..., Tensor]:
    from nemotron_v3.ops.experts.kernels import experts

    return experts


def refuse_experts(dtypes: Sequence[torch.dtype], experts: int, rows: int) -> str | None:
    """Why the kernels cannot take the experts' tensors, or None."""
    if experts > MOST_EXPERTS:
        return f"it counts the rows of at most {MOST_EXPERTS} experts, and there are {experts}"
    if rows > MOST_ROWS:
        return f"it numbers at most {MOST_ROWS} routed rows, and there are {rows}"
    return refuse_dtypes(dtypes)


_OP = Op(
    "experts",
    reference=reference.experts,
    portable=portable.experts,
    kernels=_kernels,
    refuse=refuse_experts,
    check=Check("idle-experts"),
)


@_OP.public
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
        indices: `[T, K]` int64 in [0, E]; E is an expert that is not here: the choice adds nothing,
            and its weight has a gradient of 0.
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
    x = x.to(dtype)
    if not x.shape[0]:
        return of_no_tokens(x, weights, up_proj, down_proj)
    run = _OP.pick(impl, (x, weights), E, max(MOST_ROWS, weights.numel()))
    return run(x, indices, weights, up_proj.to(dtype), down_proj.to(dtype)).to(dtype)
