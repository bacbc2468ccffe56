"""What joins a token's rows again. Letters: T tokens, K choices a token, R routed rows, X width."""

import triton.language as tl

from nemotron_v3.ops.common.jit import kernel


@kernel
def combine_kernel(
    rows,
    place,
    weights,
    out,
    T,
    X,
    stride_rows,
    stride_out,
    CHOICES: tl.constexpr,
    FLOOR: tl.constexpr,
    BLOCK_T: tl.constexpr,
    BLOCK_X: tl.constexpr,
    LIVE: tl.constexpr,
):
    """`out[t] = sum_k rows[place[t, k]]` in fp32, of those that have a place; where LIVE, without
    rows of no weight."""
    n_x = tl.cdiv(X, BLOCK_X)
    o_t = (tl.program_id(0) // n_x) * BLOCK_T + tl.arange(0, BLOCK_T)
    o_x = (tl.program_id(0) % n_x) * BLOCK_X + tl.arange(0, BLOCK_X)
    m_t = o_t < T
    m_tx = m_t[:, None] & (o_x < X)[None, :]
    b_sum = tl.zeros([BLOCK_T, BLOCK_X], tl.float32)
    for k in tl.static_range(CHOICES):
        o_r = o_t * CHOICES + k
        # [BLOCK_T]
        b_p = tl.load(place + o_r, mask=m_t, other=0).to(tl.int64)
        m_k = m_tx & (b_p >= 0)[:, None]
        if LIVE:
            b_w = tl.load(weights + o_r, mask=m_t, other=0.0)
            # NaN is not below the floor: its row stays
            m_k = m_k & (tl.where(tl.abs(b_w) < FLOOR, 0, 1) > 0)[:, None]
        # [BLOCK_T, BLOCK_X]
        p_rows = rows + b_p[:, None] * stride_rows + o_x[None, :]
        b_sum += tl.load(p_rows, mask=m_k, other=0.0).to(tl.float32)
    p_out = out + o_t[:, None].to(tl.int64) * stride_out + o_x[None, :]
    tl.store(p_out, b_sum.to(out.dtype.element_ty), mask=m_tx)


@kernel
def gather_sums_kernel(partial, place, out, R, parts, BLOCK: tl.constexpr):
    """`out[r] = sum_i partial[i, place[r]]`: a row's gradient of its weight, 0 without a place."""
    o_r = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    m_r = o_r < R
    b_p = tl.load(place + o_r, mask=m_r, other=0).to(tl.int64)
    b_sum = tl.zeros([BLOCK], tl.float32)
    m_here = m_r & (b_p >= 0)
    p_partial = partial + b_p
    for _ in range(0, parts):
        b_sum += tl.load(p_partial, mask=m_here, other=0.0)
        p_partial += R
    tl.store(out + o_r, b_sum, mask=m_r)
