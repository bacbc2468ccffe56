"""Loads and stores that all kernels of the scan share."""

import triton
import triton.language as tl


@triton.jit
def load_head(p, stride, o_row, m_row, SIZES: tl.constexpr):
    """`[rows, BLOCK_P]`, a head's columns of rows `stride` apart; 0 outside."""
    return _load_rows(p, stride, o_row, m_row, SIZES.P, SIZES.BLOCK_P)


@triton.jit
def load_group(p, stride, o_row, m_row, SIZES: tl.constexpr):
    """`[rows, BLOCK_N]`, a group's columns of rows `stride` apart; 0 outside."""
    return _load_rows(p, stride, o_row, m_row, SIZES.N, SIZES.BLOCK_N)


@triton.jit
def store_head(p, stride, o_row, m_row, b, SIZES: tl.constexpr):
    _store_rows(p, stride, o_row, m_row, b, SIZES.P, SIZES.BLOCK_P)


@triton.jit
def store_group(p, stride, o_row, m_row, b, SIZES: tl.constexpr):
    _store_rows(p, stride, o_row, m_row, b, SIZES.N, SIZES.BLOCK_N)


@triton.jit
def _load_rows(p, stride, o_row, m_row, SIZE: tl.constexpr, BLOCK: tl.constexpr):
    o = tl.arange(0, BLOCK)
    m = m_row[:, None]
    if SIZE != BLOCK:
        m = m & (o < SIZE)[None, :]
    return tl.load(p + o_row[:, None] * stride + o[None, :], mask=m, other=0.0)


@triton.jit
def _store_rows(p, stride, o_row, m_row, b, SIZE: tl.constexpr, BLOCK: tl.constexpr):
    o = tl.arange(0, BLOCK)
    m = m_row[:, None]
    if SIZE != BLOCK:
        m = m & (o < SIZE)[None, :]
    tl.store(p + o_row[:, None] * stride + o[None, :], b.to(p.dtype.element_ty), mask=m)


@triton.jit
def load_state(p, SIZES: tl.constexpr, dtype: tl.constexpr):
    """`[BLOCK_P, BLOCK_N]` of a state `[P, N]`, rounded to `dtype`; 0 outside."""
    o_p = tl.arange(0, SIZES.BLOCK_P)
    o_n = tl.arange(0, SIZES.BLOCK_N)
    p += o_p[:, None] * SIZES.N + o_n[None, :]
    if SIZES.P == SIZES.BLOCK_P and SIZES.N == SIZES.BLOCK_N:
        return tl.load(p).to(dtype)
    m = (o_p < SIZES.P)[:, None] & (o_n < SIZES.N)[None, :]
    return tl.load(p, mask=m, other=0.0).to(dtype)


@triton.jit
def decay(a):
    """`exp2(a)` as fp32, computed in the dtype of the running sums."""
    return tl.exp2(a).to(tl.float32)


@triton.jit
def decay_down(b_d):
    """`exp2(b_d)`, but 1 where that would be more.

    For pairs j <= i the difference is at most 0. The others are masked in what it multiplies: one
    instruction an element here, where a mask would cost two and its registers.
    """
    return decay(tl.minimum(b_d, 0.0))


@triton.jit
def load_dA(dA_cumsum, o, o_other, length, TILE: tl.constexpr):
    """`a` and `dt` of two tiles of a head, which begin at `o` and `o_other`, for `split_dA`.

    `dA_cumsum` points at the chunk, of `length` tokens. Behind its last token all goes on as it is
    there, so that `a` never rises; what is multiplied by it is 0, and a mask here would cost each
    thread three instructions an element.

    One load of all of them, because it is then large enough for the compiler to send it through
    shared memory: it reads smaller vectors anew in each layout that uses them, element by element.
    """
    o_t = tl.arange(0, TILE)[:, None, None]
    o_k = tl.arange(0, 2)[None, :, None]
    o_e = tl.arange(0, 2)[None, None, :]
    place = tl.minimum(tl.where(o_k == 0, o, o_other) + o_t, length - 1)
    return tl.load(dA_cumsum + place * 2 + o_e)


@triton.jit
def split_dA(b_dA):
    """`a` and dt of the first tile, `a` and dt of the other: four vectors `[TILE]`."""
    b_a, b_dt = tl.split(b_dA)
    b_a, b_a_other = tl.split(b_a)
    b_dt, b_dt_other = tl.split(b_dt)
    return b_a, b_dt.to(tl.float32), b_a_other, b_dt_other.to(tl.float32)


@triton.jit
def load_cumsum(dA_cumsum, row, t):
    """`a` of one token."""
    return tl.load(dA_cumsum + (row + t) * 2)
