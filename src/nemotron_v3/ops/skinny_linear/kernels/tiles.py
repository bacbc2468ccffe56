"""A tile of `weight x^T` for a few rows of x: what every product of a decode step is made of.

Letters: m outputs, n inputs, R rows. A weight is read once, in whole lines, and lies first in the
product: 16 rows of x fill the short side of a tensor core's tile, whether they are there or not.
"""

import triton
import triton.language as tl


@triton.jit
def multiply(b_w, b_x):
    """`[M, N] x [N, R]` in fp32. 16-bit products are exact in it; fp32 ones take no tf32."""
    if b_w.dtype == tl.float32:
        return tl.dot(b_w, b_x.to(tl.float32), input_precision="ieee")
    return tl.dot(b_w, b_x.to(b_w.dtype))


@triton.jit
def weight_times_rows(p_w, p_x, m_m, m_r, n, BLOCKS: tl.constexpr, EVEN: tl.constexpr):
    """`weight x^T`, fp32 `[m, r]` of the `launch.Blocks`.

    Tensor cores add to a long sum by cutting off, so none of theirs is longer than a block.

    Args:
        p_w: where the weight's rows begin, `[m]`.
        p_x: where x's rows begin, `[r]`.
        m_m, m_r: which of them there are.
        EVEN: the inputs are a multiple of a block's.
    """
    o_n = tl.arange(0, BLOCKS.n)
    b_sum = tl.zeros([tl.constexpr(BLOCKS.m), tl.constexpr(BLOCKS.r)], tl.float32)
    for k in tl.range(0, n, BLOCKS.n, num_stages=BLOCKS.stages):
        m_n = k + o_n < n
        # [m, n], [n, r]
        if EVEN:
            b_w = tl.load(p_w[:, None] + (k + o_n)[None, :], mask=m_m[:, None], other=0.0)
            b_x = tl.load(p_x[None, :] + (k + o_n)[:, None], mask=m_r[None, :], other=0.0)
        else:
            m_w, m_x = m_m[:, None] & m_n[None, :], m_r[None, :] & m_n[:, None]
            b_w = tl.load(p_w[:, None] + (k + o_n)[None, :], mask=m_w, other=0.0)
            b_x = tl.load(p_x[None, :] + (k + o_n)[:, None], mask=m_x, other=0.0)
        b_sum += multiply(b_w, b_x)
    return b_sum


@triton.jit
def weight_times_vector(
    p_w, x, gain, m_m, n, eps, NORM: tl.constexpr, GROUP: tl.constexpr, BLOCKS: tl.constexpr
):
    """`weight (norm x)` of one row, fp32 `[m]` of the `launch.Blocks`, by multiplications that each
    thread adds up for itself: nothing is exchanged between threads before the end.

    GROUP is 0 for a norm over all inputs, else a block's inputs.
    """
    o_n = tl.arange(0, BLOCKS.n)
    b_sum = tl.zeros([tl.constexpr(BLOCKS.m), tl.constexpr(BLOCKS.n)], tl.float32)
    b_square = tl.zeros([tl.constexpr(BLOCKS.n)], tl.float32)
    for k in tl.range(0, n, BLOCKS.n, num_stages=BLOCKS.stages):
        m_n = k + o_n < n
        m_w = m_m[:, None] & m_n[None, :]
        b_w = tl.load(p_w[:, None] + (k + o_n)[None, :], mask=m_w, other=0.0)
        b_x = tl.load(x + k + o_n, mask=m_n, other=0.0).to(tl.float32)
        if NORM:
            b_gain = tl.load(gain + k + o_n, mask=m_n, other=0.0).to(tl.float32)
            if GROUP > 0:
                b_x = b_x / tl.sqrt_rn(tl.sum(b_x * b_x) / GROUP + eps)
            else:
                b_square += b_x * b_x
            b_x = b_x * b_gain
        b_sum += b_w.to(tl.float32) * b_x[None, :]
    b_y = tl.sum(b_sum, 1)
    if NORM and GROUP == 0:
        b_y = b_y / tl.sqrt_rn(tl.sum(b_square) / n + eps)
    return b_y


@triton.jit
def low_rank_rows(p_b, p_t, m_m, m_r, rank, RANK: tl.constexpr):
    """`b t`, fp32 `[m, r]`: a low-rank update behind its thin products.

    Args:
        p_b: where the rows of b begin, `[m]`.
        p_t: where the thin products of each row of x begin, `[r]`.
        m_m, m_r: which of them there are.
        RANK: `rank`, filled up.
    """
    o_k = tl.arange(0, RANK)
    m_k = o_k < rank
    b_b = tl.load(p_b[:, None] + o_k[None, :], mask=m_m[:, None] & m_k[None, :], other=0.0)
    b_t = tl.load(p_t[None, :] + o_k[:, None], mask=m_r[None, :] & m_k[:, None], other=0.0)
    return multiply(b_b, b_t)


@triton.jit
def low_rank_vector(p_b, t, m_m, rank, RANK: tl.constexpr):
    """The same of one row, fp32 `[m]`."""
    o_k = tl.arange(0, RANK)
    m_k = o_k < rank
    b_b = tl.load(p_b[:, None] + o_k[None, :], mask=m_m[:, None] & m_k[None, :], other=0.0)
    b_t = tl.load(t + o_k, mask=m_k, other=0.0)
    return tl.sum(b_b.to(tl.float32) * b_t[None, :], 1)
