"""The public routed experts with low-rank updates."""

from collections.abc import Callable

from torch import Tensor

from nemotron_v3.ops.common.no_tokens import of_no_tokens
from nemotron_v3.ops.common.precision import autocast_matmul_dtype
from nemotron_v3.ops.common.selfcheck import Check
from nemotron_v3.ops.experts.op import MOST_ROWS, refuse_experts
from nemotron_v3.ops.grouped_low_rank import portable, reference
from nemotron_v3.ops.grouped_low_rank.merge import check_low_rank
from nemotron_v3.ops.grouped_low_rank.merge import merge_low_rank_ as merge_low_rank_
from nemotron_v3.ops.grouped_low_rank.merge import unmerge_low_rank_ as unmerge_low_rank_
from nemotron_v3.ops.registry import Op


def _kernels() -> Callable[..., Tensor]:
    from nemotron_v3.ops.grouped_low_rank.kernels import grouped_low_rank

    return grouped_low_rank


_OP = Op(
    "grouped_low_rank",
    reference=reference.grouped_low_rank,
    portable=portable.grouped_low_rank,
    kernels=_kernels,
    refuse=refuse_experts,
    check=Check("idle-experts"),
)


@_OP.public
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
    impl: str = "auto",
) -> Tensor:
    """`experts` with `up[e] + scale up_b[e] up_a[e]` and `down[e] + scale down_b[e] down_a[e]`.

    The updates (LoRA, Hu et al. 2021, arXiv 2106.09685, one an expert) act beside the stacks, which
    stay as they are and need no gradient.

    Letters: T packed tokens, K choices a token, E experts, X width, F expert width, r rank.

    Args:
        x: `[T, X]`; under autocast it and all matrices take part in the autocast dtype.
        indices: `[T, K]` int64 in [0, E]; E is an expert that is not here, see `experts`.
        weights: `[T, K]`.
        up_proj: `[E, F, X]`. up_a: `[E, r, X]`. up_b: `[E, F, r]`.
        down_proj: `[E, X, F]`. down_a: `[E, s, F]`. down_b: `[E, X, s]`, of a rank s of its own.
        scale: of both updates (alpha / r, in LoRA's words).
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
    check_low_rank("up_proj", up_proj, up_a, up_b)
    check_low_rank("down_proj", down_proj, down_a, down_b)
    dtype = autocast_matmul_dtype(x)
    x = x.to(dtype)
    if not x.shape[0]:
        low_rank = (up_a, up_b, down_a, down_b)
        return of_no_tokens(x, weights, up_proj, down_proj, *low_rank)
    matrices = (m.to(dtype) for m in (up_proj, down_proj, up_a, up_b, down_a, down_b))
    run = _OP.pick(impl, (x, weights), E, max(MOST_ROWS, weights.numel()))
    return run(x, indices, weights, *matrices, scale=scale).to(dtype)
