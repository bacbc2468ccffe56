"""The public projections of a few rows, with the norm before them and the residual sum behind."""

from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from nemotron_v3.ops.common.host import refuse_dtypes, refuse_mixed
from nemotron_v3.ops.common.low_rank import LowRank
from nemotron_v3.ops.registry import Op
from nemotron_v3.ops.skinny_linear import portable, reference
from nemotron_v3.ops.skinny_linear.norm import Norm

MOST_WEIGHTS = 3


def _kernels() -> Callable:
    from nemotron_v3.ops.skinny_linear.kernels import skinny_linear

    return skinny_linear


def _refusal(dtypes: Sequence[torch.dtype | None], weights: int, contiguous: bool) -> str | None:
    """Why the kernels cannot take a call, or None; the last of the dtypes are the weights'."""
    if not contiguous:
        return "a weight or a bias is not contiguous"
    return refuse_dtypes(dtypes) or refuse_mixed(d for d in dtypes[-weights:] if d is not None)


_OP = Op(
    "skinny_linear",
    reference=reference.skinny_linear,
    portable=portable.skinny_linear,
    kernels=_kernels,
    refuse=_refusal,
)


@_OP.public
@torch.no_grad()
def skinny_linear(
    x: Tensor,
    *weights: Tensor,
    biases: tuple[Tensor | None, ...] | None = None,
    norm: Norm | None = None,
    residual: Tensor | None = None,
    low_rank: tuple[LowRank | None, ...] | None = None,
    out: Tensor,
    impl: str = "auto",
) -> Tensor:
    """`out = W (norm x) + b + residual` for the few rows of a decode step (README.md).

    No value is read, so that a CUDA graph can hold the call; no gradients flow.

    Letters: R rows, m outputs, n inputs.

    Args:
        x: `[R, n]`, neighbouring columns.
        weights: one to three `[m, n]` of one dtype, side by side in the result.
        biases: of each weight, `[m]`, for all of them or for none.
        norm: of x.
        low_rank: of each weight, what is added to it, or None.
        residual: `[R, sum of m]`, laid out as `out`; it may be `out` itself.
        out: `[R, sum of m]`, in any floating dtype, neighbouring columns; not x.
        impl: see `nemotron_v3.ops`.

    Returns:
        `out`.

    Raises:
        ValueError: shapes, dtypes or layouts that do not fit.
    """
    biases = (None,) * len(weights) if biases is None else tuple(biases)
    _check_weights(x, weights, biases, norm)
    _check_result(x, sum(map(len, weights)), residual, out)
    updates = _matrices(weights, low_rank)
    contiguous = all(t is None or t.is_contiguous() for t in (*weights, *biases, *updates))
    others = (x, *biases, None if norm is None else norm.weight, residual, out, *updates)
    run = _OP.pick(impl, (*others, *weights), len(weights), contiguous)
    return run(x, weights, biases, norm=norm, residual=residual, low_rank=low_rank, out=out)


def _matrices(
    weights: tuple[Tensor, ...], low_rank: tuple[LowRank | None, ...] | None
) -> list[Tensor]:
    """Those of all updates; raises ValueError where one does not fit its weight."""
    if low_rank is None:
        return []
    if len(low_rank) != len(weights):
        raise ValueError(f"{len(low_rank)} updates of {len(weights)} weights: give one a weight")
    for weight, update in zip(weights, low_rank, strict=True):
        if update is not None:
            _check_update(update, *weight.shape)
    return [matrix for update in low_rank if update is not None for matrix in update[:2]]


def _check_update(update: LowRank, m: int, n: int) -> None:
    """Raises ValueError unless an update fits a weight `[m, n]`."""
    r = update.a.shape[0]
    if tuple(update.a.shape) != (r, n) or tuple(update.b.shape) != (m, r) or not r:
        raise ValueError(
            f"a {tuple(update.a.shape)} and b {tuple(update.b.shape)} do not fit a weight "
            f"({m}, {n}): (rank, {n}) and ({m}, rank) are needed"
        )
    if update.a.dtype != update.b.dtype:
        raise ValueError(f"a in {update.a.dtype} and b in {update.b.dtype}: one is needed")


def _check_weights(
    x: Tensor, weights: tuple[Tensor, ...], biases: tuple[Tensor | None, ...], norm: Norm | None
) -> None:
    if not 1 <= len(weights) <= MOST_WEIGHTS:
        raise ValueError(f"{len(weights)} weights: give one to {MOST_WEIGHTS}")
    if x.dim() != 2 or (x.shape[1] > 1 and x.stride(1) != 1):
        raise ValueError(
            f"x {tuple(x.shape)} of strides {x.stride()} must be (rows, inputs) with neighbouring "
            "columns"
        )
    n = x.shape[1]
    for weight in weights:
        if weight.dim() != 2 or weight.shape[1] != n or weight.dtype != weights[0].dtype:
            raise ValueError(
                f"a weight {tuple(weight.shape)} in {weight.dtype} must be (outputs, {n}) in "
                f"{weights[0].dtype}"
            )
    sizes = [len(weight) for weight in weights]
    given = [None if bias is None else tuple(bias.shape) for bias in biases]
    if given not in ([None] * len(sizes), [(size,) for size in sizes]):
        raise ValueError(
            f"biases of shapes {given} do not fit weights of {sizes} outputs: give one a weight, "
            "or none"
        )
    if norm is not None and (norm.weight.shape != (n,) or norm.group < 0 or n % (norm.group or n)):
        raise ValueError(
            f"a norm of weight {tuple(norm.weight.shape)} and groups of {norm.group} does not fit "
            f"{n} inputs"
        )


def _check_result(x: Tensor, m: int, residual: Tensor | None, out: Tensor) -> None:
    needed = (len(x), m)
    if tuple(out.shape) != needed or (m > 1 and out.stride(1) != 1):
        raise ValueError(
            f"out {tuple(out.shape)} of strides {out.stride()}: {needed} with neighbouring columns "
            "is needed"
        )
    if x.data_ptr() == out.data_ptr() != 0:
        raise ValueError("out is x, which other programs still read: give another tensor")
    if residual is None:
        return
    if residual.shape != out.shape or residual.stride() != out.stride():
        raise ValueError(
            f"residual {tuple(residual.shape)} of strides {residual.stride()} must be laid out as "
            f"out, {needed} of strides {out.stride()}"
        )
