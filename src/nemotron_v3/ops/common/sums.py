"""Sums of partial sums, in one launch and in a fixed order.

Letters: R programs that left a partial sum, K sums of each, C columns.
"""

import triton.language as tl
from torch import Tensor

from nemotron_v3.ops.common.jit import kernel
from nemotron_v3.ops.common.launch import Launcher

BLOCK_R, BLOCK_C = 32, 64


@kernel
def sums_kernel(
    partial,
    first,
    second,
    third,
    R,
    C,
    K: tl.constexpr,
    USED: tl.constexpr,
    FIRST: tl.constexpr,
    BLOCK_R: tl.constexpr,
    BLOCK_C: tl.constexpr,
):
    """The first FIRST sums go to `first` `[C, FIRST]`, then one each to the others, `[C]`."""
    i_k = tl.program_id(0) % USED
    o_c = (tl.program_id(0) // USED) * BLOCK_C + tl.arange(0, BLOCK_C)
    m_c = o_c < C
    o_r = tl.arange(0, BLOCK_R)
    b_sum = tl.zeros([BLOCK_R, BLOCK_C], tl.float32)
    for r in range(0, R, BLOCK_R):
        # [BLOCK_R, BLOCK_C]
        m = (r + o_r < R)[:, None] & m_c[None, :]
        p_r = partial + ((r + o_r).to(tl.int64)[:, None] * K + i_k) * C + o_c[None, :]
        b_sum += tl.load(p_r, mask=m, other=0.0)
    b_total = tl.sum(b_sum, 0)
    if i_k < FIRST:
        tl.store(first + o_c * FIRST + i_k, b_total.to(first.dtype.element_ty), mask=m_c)
    elif i_k == FIRST:
        tl.store(second + o_c, b_total.to(second.dtype.element_ty), mask=m_c)
    else:
        tl.store(third + o_c, b_total.to(third.dtype.element_ty), mask=m_c)


_launch = Launcher(sums_kernel)


def sum_partials(partial: Tensor, *results: Tensor) -> None:
    """The sums over the first dimension of `partial` `[R, K, C]` fp32, written to `results`.

    Args:
        results: at most three, contiguous. The first may be `[C, k]` and takes the first k of the K
            sums; the others are `[C]`, and sums that are left over go nowhere.
    """
    R, K, C = partial.shape
    first = results[0].numel() // C
    used = first + len(results) - 1
    outputs = (*results, *results[:1] * 2)[:3]
    _launch(
        -(-C // BLOCK_C) * used,
        (partial, *outputs),
        (R, C),
        (K, used, first, BLOCK_R, BLOCK_C),
    )
