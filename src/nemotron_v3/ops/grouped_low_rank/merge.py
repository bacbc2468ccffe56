"""Low-rank updates added to a stack of experts, and taken out again exactly.

Letters: E experts, O and I widths of a matrix, r rank.
"""

import torch
from torch import Tensor

from nemotron_v3.ops.common.precision import WIDE


@torch.no_grad()
def merge_low_rank_(
    weight: Tensor,
    a: Tensor,
    b: Tensor,
    *,
    scale: float = 1.0,
    keep_on: torch.device | str | None = None,
) -> Tensor:
    """`weight[e] += scale b[e] a[e]` in place; returns what `unmerge_low_rank_` needs.

    The sum is computed in fp32 or wider, an expert at a time, and rounded once to the weight's
    dtype. Adding in 16 bits cannot be undone by subtracting, so the old weight is kept.

    Args:
        weight: `[E, O, I]`.
        a: `[E, r, I]`.
        b: `[E, O, r]`.
        scale: of the update.
        keep_on: the device of what is returned; the weight's own if None.

    Returns:
        The weight before, a copy.

    Raises:
        ValueError: shapes that do not fit; nothing is changed.
    """
    check_low_rank("weight", weight, a, b)
    base = weight.detach().clone() if keep_on is None else weight.detach().to(keep_on, copy=True)
    dtype = WIDE[weight.dtype]
    try:
        for matrix, a_e, b_e in zip(weight.unbind(0), a.unbind(0), b.unbind(0), strict=True):
            matrix.copy_(torch.addmm(matrix.to(dtype), b_e.to(dtype), a_e.to(dtype), alpha=scale))
    except BaseException:  # out of memory, interrupted: half a merge is none
        weight.copy_(base)
        raise
    return base


@torch.no_grad()
def unmerge_low_rank_(weight: Tensor, base: Tensor) -> None:
    """Give a merged weight back what it was, bit for bit.

    Args:
        weight: that `merge_low_rank_` changed.
        base: what it returned.

    Raises:
        ValueError: another shape or dtype; nothing is changed.
    """
    if weight.shape != base.shape or weight.dtype != base.dtype:
        raise ValueError(
            f"the weight is {weight.dtype} {tuple(weight.shape)}, what was kept of it {base.dtype} "
            f"{tuple(base.shape)}: they are not of one merge"
        )
    weight.copy_(base)


def check_low_rank(name: str, weight: Tensor, a: Tensor, b: Tensor) -> None:
    """Raises ValueError unless `a [E, r, I]` and `b [E, O, r]` fit `weight [E, O, I]`."""
    E, O, I = weight.shape  # noqa: E741
    r = a.shape[1] if a.dim() == 3 else -1
    if tuple(a.shape) != (E, r, I) or tuple(b.shape) != (E, O, r):
        raise ValueError(
            f"{name} {tuple(weight.shape)} and its update a {tuple(a.shape)}, b {tuple(b.shape)} "
            f"do not fit: (E, O, I), (E, rank, I), (E, O, rank)"
        )
