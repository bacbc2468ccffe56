"""The products of the experts' low-rank updates with what the experts see: a few numbers a choice.

Letters: R rows, K choices a row, E experts, r rank.
"""

import triton.language as tl

from nemotron_v3.ops.common.early import start_early
from nemotron_v3.ops.common.jit import kernel
from nemotron_v3.ops.skinny_linear.kernels.thin import thin_product


@kernel
def thin_kernel(
    x,
    shared_x,
    a,
    shared_a,
    experts,
    thin,
    shared_thin,
    choices,
    n,
    shared_n,
    rank,
    shared_rank,
    scale,
    shared_scale,
    SHARE: tl.constexpr,
    ROUTED: tl.constexpr,
    SHARED: tl.constexpr,
    BLOCK_M: tl.constexpr,
    ALL_N: tl.constexpr,
    SHARED_ALL_N: tl.constexpr,
    PDL: tl.constexpr,
):
    """A program has BLOCK_M ranks of one choice, or of one row and the shared expert behind them.

    Writes:
        thin: fp32 `[choices, r]`: `scale a[e] x` of each choice's expert e; SHARE choices have one
            row of x.
        shared_thin: fp32 `[R, r]` of the shared expert.
    """
    start_early(PDL)
    i = tl.program_id(1)
    o_m = tl.program_id(0) * BLOCK_M + tl.arange(0, BLOCK_M)
    if ROUTED:  # noqa: SIM102 - a constant's and a tensor's
        if i < choices:
            expert = tl.load(experts + i)
            if expert >= 0:
                o_n = tl.arange(0, ALL_N)
                p_x = x + (i // SHARE).to(tl.int64) * n
                b_x = tl.load(p_x + o_n, mask=o_n < n, other=0.0).to(tl.float32)
                p_a = a + expert.to(tl.int64) * rank * n
                b_t = thin_product(b_x, p_a, o_m, o_m < rank, n, ALL_N) * scale
                tl.store(thin + i * rank + o_m, b_t, mask=o_m < rank)
    if SHARED:  # noqa: SIM102
        if i >= choices:
            r = i - choices
            o_n = tl.arange(0, SHARED_ALL_N)
            p_x = shared_x + r.to(tl.int64) * shared_n
            b_x = tl.load(p_x + o_n, mask=o_n < shared_n, other=0.0).to(tl.float32)
            b_t = thin_product(b_x, shared_a, o_m, o_m < shared_rank, shared_n, SHARED_ALL_N)
            p_t = shared_thin + r * shared_rank
            tl.store(p_t + o_m, b_t * shared_scale, mask=o_m < shared_rank)
