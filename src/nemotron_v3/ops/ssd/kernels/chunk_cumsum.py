"""Step sizes and running sums of the log-decay, and their backward.

Letters: T packed tokens, H heads, Q tokens of a chunk. `dA_cumsum` `[H, T, 2]` holds `a` and `dt`
of a token; `a` is the sum of `dt A log2(e)` from the chunk's first token on, so that a decay is one
`exp2`. An error of `a` is a relative error of a decay: it is fp64 where results are fp32, else
fp32.
"""

import triton
import triton.language as tl

from nemotron_v3.ops.common.jit import kernel

LOG2E = tl.constexpr(1.4426950408889634)
BLOCK_H = tl.constexpr(4)  # heads of a program: few, for many programs in flight


@triton.jit
def _exp_of_negative(u):
    """exp(-u) for u >= 0 to an ulp or two: `tl.exp` alone loses u ulps."""
    u = tl.minimum(u, 100.0)
    n = tl.floor(u * -1.4426950408889634 + 0.5)
    r = (u * -1.4423828125 - n) - u * 0.000312228388963  # log2(e) in two parts
    return tl.exp2(r) * tl.exp2(n)


@triton.jit
def softplus(u):
    """max(u, 0) + log1p(exp(-|u|)), the logarithm as 2 atanh(e / (2 + e)): no digits are lost."""
    e = _exp_of_negative(tl.abs(u))
    s = e / (2.0 + e)
    q = s * s
    r = 1.0 / 15 + q * (1.0 / 17)
    r = 1.0 / 11 + q * (1.0 / 13 + q * r)
    r = 1.0 / 7 + q * (1.0 / 9 + q * r)
    r = 1.0 / 3 + q * (1.0 / 5 + q * r)
    return tl.maximum(u, 0.0) + 2.0 * s * (1.0 + q * r)


@kernel
def chunk_cumsum_fwd_kernel(
    dt,
    dt_bias,
    A,
    dA_cumsum,
    chunk_start,
    chunk_end,
    T,
    H,
    low,
    high,
    STRIDE_dt: tl.constexpr,
    SIZES: tl.constexpr,
    LOG_A: tl.constexpr,
):
    """LOG_A: `A` holds log(-A)."""
    n_h = tl.cdiv(H, BLOCK_H)
    i_c = tl.program_id(0) // n_h
    o_h = (tl.program_id(0) % n_h) * BLOCK_H + tl.arange(0, BLOCK_H)
    m_h = o_h < H
    start = tl.load(chunk_start + i_c)
    end = tl.load(chunk_end + i_c)
    o_t = tl.arange(0, SIZES.Q)
    m_th = (start + o_t < end)[:, None] & m_h[None, :]
    # [Q, BLOCK_H]
    p_dt = dt + start * STRIDE_dt + o_t[:, None] * STRIDE_dt + o_h[None, :]
    b_u = tl.load(p_dt, mask=m_th, other=0.0).to(tl.float32)
    if dt_bias is not None:
        b_u += tl.load(dt_bias + o_h, mask=m_h, other=0.0).to(tl.float32)[None, :]
    b_A = tl.load(A + o_h, mask=m_h, other=0.0).to(dA_cumsum.dtype.element_ty)
    if LOG_A:
        b_A = -tl.exp(b_A)
    b_u = b_u.to(dA_cumsum.dtype.element_ty)
    b_dt = tl.minimum(tl.maximum(softplus(b_u), low), high)
    b_dt = tl.where(m_th, b_dt, 0.0)
    # Differences of these sums are what counts: rounded once, at the end.
    b_a = tl.cumsum((b_dt * b_A[None, :]).to(tl.float64) * LOG2E, 0)
    p_dA = dA_cumsum + (start + o_h.to(tl.int64)[None, :] * T + o_t[:, None]) * 2
    tl.store(p_dA, b_a.to(dA_cumsum.dtype.element_ty), mask=m_th)
    tl.store(p_dA + 1, b_dt.to(dA_cumsum.dtype.element_ty), mask=m_th)


@kernel
def chunk_cumsum_bwd_kernel(
    dt,
    dt_bias,
    A,
    dA_cumsum,
    ddA_rows,
    ddA_columns,
    ddA_across,
    CB_diagonal,
    ddA_from_states,
    ddA_to_states,
    x_dot_dy,
    ddA_through,
    ddt,
    sums,
    chunk_start,
    chunk_end,
    T,
    H,
    low,
    high,
    STRIDE_dt: tl.constexpr,
    STRIDE_ddt: tl.constexpr,
    SIZES: tl.constexpr,
    LOG_A: tl.constexpr,
):
    """From what the scan's backward left for each token to the gradients of the steps.

    The gradient of the log-decay at t is the weight of all pairs (j, i) with j < t <= i, put
    together from sums over i or over j that are all of one sign of t: no sum is taken whole and
    then subtracted again, except inside a tile (`ddA_rows` and `ddA_columns`).
    """
    n_h = tl.cdiv(H, BLOCK_H)
    i_c = (tl.program_id(0) // n_h).to(tl.int64)
    o_h = (tl.program_id(0) % n_h) * BLOCK_H + tl.arange(0, BLOCK_H)
    m_h = o_h < H
    start = tl.load(chunk_start + i_c)
    end = tl.load(chunk_end + i_c)
    o_t = tl.arange(0, SIZES.TILE)
    o_h64 = o_h.to(tl.int64)

    b_A = tl.load(A + o_h, mask=m_h, other=0.0).to(dA_cumsum.dtype.element_ty)
    if LOG_A:
        b_A = -tl.exp(b_A)
    b_A = b_A.to(tl.float32)
    b_bias = tl.zeros([BLOCK_H], tl.float32)
    if dt_bias is not None:
        b_bias = tl.load(dt_bias + o_h, mask=m_h, other=0.0).to(tl.float32)
    # [BLOCK_H]: the state before the chunk that reaches beyond it
    o_r = tl.arange(0, SIZES.BLOCK_P)
    p_through = ddA_through + (i_c * H + o_h64)[:, None] * SIZES.BLOCK_P + o_r[None, :]
    b_through = tl.sum(tl.load(p_through, mask=m_h[:, None], other=0.0), 1)
    o_first = start + o_h64[:, None] * T + o_t[None, :]
    o_second = o_first + SIZES.TILE
    m_first = m_h[:, None] & (start + o_t < end)[None, :]
    m_second = m_h[:, None] & (start + SIZES.TILE + o_t < end)[None, :]
    b_later = tl.sum(tl.load(ddA_from_states + o_second, mask=m_second, other=0.0), 1)
    b_dt = tl.load(dA_cumsum + o_first * 2 + 1, mask=m_first, other=0.0)
    b_earlier = tl.sum(tl.load(ddA_to_states + o_first, mask=m_first, other=0.0) * b_dt, 1)

    b_dA = tl.zeros([BLOCK_H], tl.float32)
    b_dbias = tl.zeros([BLOCK_H], tl.float32)
    b_dD = tl.zeros([BLOCK_H], tl.float32)
    for i_m in tl.static_range(2):
        o = o_first if i_m == 0 else o_second
        m = m_first if i_m == 0 else m_second
        # Of the token before, in the same tile.
        m_before = m & (o_t > 0)[None, :]
        b_dt_before = tl.load(dA_cumsum + (o - 1) * 2 + 1, mask=m_before, other=0.0)
        b_to_before = tl.load(ddA_to_states + o - 1, mask=m_before, other=0.0)
        # [BLOCK_H, TILE]: over dt
        b_skip = tl.load(x_dot_dy + o, mask=m, other=0.0)
        o_own = (
            start + i_m * SIZES.TILE + (o_h64 // SIZES.HEADS_OF_GROUP)[:, None] * T + o_t[None, :]
        )
        b_direct = b_skip * tl.load(CB_diagonal + o_own, mask=m, other=0.0)
        b_direct += tl.load(ddA_columns + o, mask=m, other=0.0)
        b_direct += tl.load(ddA_to_states + o, mask=m, other=0.0)
        b_dt = tl.load(dA_cumsum + o * 2 + 1, mask=m, other=0.0)
        b_q = b_through[:, None] + tl.cumsum(b_to_before * b_dt_before, 1)
        # pairs that end before the tile does or after it
        if i_m == 0:
            b_direct += tl.load(ddA_across + o, mask=m, other=0.0)
            b_across = tl.load(ddA_across + o - 1, mask=m_before, other=0.0)
            b_q += tl.cumsum(b_across * b_dt_before, 1) + b_later[:, None]
        else:
            b_across = tl.load(ddA_across + o, mask=m, other=0.0)
            b_q += tl.cumsum(b_across, 1, reverse=True) + b_earlier[:, None]
        # Pairs in the tile: what they cancel was multiplied by dt as fp32.
        b_pairs = tl.load(ddA_rows + o, mask=m, other=0.0)
        b_pairs -= tl.load(ddA_columns + o, mask=m, other=0.0) * b_dt.to(tl.float32)
        b_q += tl.cumsum(b_pairs, 1, reverse=True)
        b_q += tl.cumsum(tl.load(ddA_from_states + o, mask=m, other=0.0), 1, reverse=True)
        b_dt = b_dt.to(tl.float32)
        b_q = b_q.to(tl.float32)
        b_ddt = b_A[:, None] * b_q + b_direct.to(tl.float32)
        b_dD += tl.sum(b_skip.to(tl.float32), 1)

        row = start + i_m * SIZES.TILE
        p_dt = dt + row * STRIDE_dt + o_t[None, :] * STRIDE_dt + o_h[:, None]
        b_u = tl.load(p_dt, mask=m, other=0.0).to(tl.float32) + b_bias[:, None]
        b_u = b_u.to(dA_cumsum.dtype.element_ty)
        b_step = softplus(b_u)
        b_slope = (1.0 / (1.0 + tl.exp(-b_u))).to(tl.float32)
        b_du = tl.where((b_step >= low) & (b_step <= high), b_ddt * b_slope, 0.0)
        b_du = tl.where(m, b_du, 0.0)
        p_ddt = ddt + row * STRIDE_ddt + o_t[None, :] * STRIDE_ddt + o_h[:, None]
        tl.store(p_ddt, b_du.to(ddt.dtype.element_ty), mask=m)
        b_dA += tl.sum(b_dt * b_q, 1)
        b_dbias += tl.sum(b_du, 1)
    if LOG_A:
        b_dA *= b_A
    p_sums = sums + i_c * 3 * H + o_h
    tl.store(p_sums, b_dA, mask=m_h)
    tl.store(p_sums + H, b_dbias, mask=m_h)
    tl.store(p_sums + 2 * H, b_dD, mask=m_h)
