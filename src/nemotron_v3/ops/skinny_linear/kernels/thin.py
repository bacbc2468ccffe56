"""The products of low-rank updates with the rows: `scale a (norm x)`, a few numbers a row.

Letters: R rows, n inputs, r rank.
"""

import triton
import triton.language as tl

from nemotron_v3.ops.common.early import start_early
from nemotron_v3.ops.common.jit import kernel


@triton.jit
def thin_product(b_x, p_a, o_m, m_m, n, ALL_N: tl.constexpr):
    """`a x`, fp32 `[BLOCK_M]`, of a whole row `[ALL_N]`: no load waits for another."""
    o_n = tl.arange(0, ALL_N)
    p = p_a + o_m[:, None].to(tl.int64) * n + o_n[None, :]
    b_a = tl.load(p, mask=m_m[:, None] & (o_n < n)[None, :], other=0.0)
    return tl.sum(b_a.to(tl.float32) * b_x[None, :], 1)


@kernel
def thin_kernel(
    x,
    gain,
    a_0,
    a_1,
    a_2,
    thin,
    N,
    rank_0,
    rank_1,
    rank_2,
    scale_0,
    scale_1,
    scale_2,
    blocks_0,
    blocks_1,
    eps,
    stride_x,
    NORM: tl.constexpr,
    GROUP: tl.constexpr,
    PARTS: tl.constexpr,
    BLOCK_M: tl.constexpr,
    ALL_N: tl.constexpr,
    PDL: tl.constexpr,
):
    """`thin` fp32 `[R, r_0 + r_1 + r_2]`: a program has BLOCK_M ranks of one update and one row.

    GROUP is 0 for a norm over all inputs; else ALL_N is n.
    """
    start_early(PDL)
    block, r = tl.program_id(0), tl.program_id(1).to(tl.int64)
    a, rank, scale, first = a_0, rank_0, scale_0, 0
    if PARTS > 1:  # noqa: SIM102 - a constant's and a tensor's
        if block >= blocks_0:
            block -= blocks_0
            a, rank, scale, first = a_1, rank_1, scale_1, rank_0
            if PARTS > 2:  # noqa: SIM102
                if block >= blocks_1:
                    block -= blocks_1
                    a, rank, scale, first = a_2, rank_2, scale_2, rank_0 + rank_1
    o_m, o_n = block * BLOCK_M + tl.arange(0, BLOCK_M), tl.arange(0, ALL_N)
    m_m, m_n = o_m < rank, o_n < N
    b_x = tl.load(x + r * stride_x + o_n, mask=m_n, other=0.0).to(tl.float32)
    b_gain = tl.full([ALL_N], 1.0, tl.float32)
    if NORM:
        b_gain = tl.load(gain + o_n, mask=m_n, other=0.0).to(tl.float32)
        if GROUP > 0:
            b_group = tl.reshape(b_x, [ALL_N // GROUP, GROUP])
            b_rms = tl.sqrt_rn(tl.sum(b_group * b_group, 1) / GROUP + eps)
            b_x = tl.reshape(b_group / b_rms[:, None], [ALL_N])
        else:
            b_x = b_x / tl.sqrt_rn(tl.sum(b_x * b_x) / N + eps)
    b_t = thin_product(b_x * b_gain, a, o_m, m_m, N, ALL_N) * scale
    tl.store(thin + r * (rank_0 + rank_1 + rank_2) + first + o_m, b_t, mask=m_m)
