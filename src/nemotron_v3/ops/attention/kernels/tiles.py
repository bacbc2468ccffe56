"""What the kernels of attention share: where a tile lies, loads that end with the document."""

import triton
import triton.language as tl


@triton.jit
def place(document, cu_seqlens, held, CACHED: tl.constexpr):
    """A document's first token, its tokens, and how many keys it holds before them."""
    start = tl.load(cu_seqlens + document)
    length = (tl.load(cu_seqlens + document + 1) - start).to(tl.int32)
    before = start.to(tl.int32) * 0
    if CACHED:
        before = tl.load(held + document).to(tl.int32)
    return start, length, before


@triton.jit
def keys_of(
    k, document, start, i_j, places, J: tl.constexpr, STRIDE: tl.constexpr, HEAD: tl.constexpr,
    CACHED: tl.constexpr,
):  # fmt: skip
    """Where the keys (or values) of a document and a head begin.

    They are `[rows, J, places, P]` in a cache, else `[T, J, P]`.
    """
    if CACHED:
        return k + (document * J + i_j) * places * STRIDE
    else:
        return k + start * STRIDE + i_j * HEAD


@triton.jit
def load_rows(p, o_row, m_row, STRIDE: tl.constexpr, P: tl.constexpr, BLOCK_P: tl.constexpr,
              MASKED: tl.constexpr):  # fmt: skip
    """`[rows, BLOCK_P]`, 0 where a row or a column is not there."""
    o_p = tl.arange(0, BLOCK_P)
    p_rows = p + o_row.to(tl.int64)[:, None] * STRIDE + o_p[None, :]
    if BLOCK_P == P:
        if MASKED:
            return tl.load(p_rows, mask=m_row[:, None], other=0.0)
        else:
            return tl.load(p_rows)
    else:
        if MASKED:
            return tl.load(p_rows, mask=m_row[:, None] & (o_p < P)[None, :], other=0.0)
        else:
            return tl.load(p_rows, mask=(o_p < P)[None, :], other=0.0)


@triton.jit
def store_rows(p, o_row, m_row, b, STRIDE: tl.constexpr, P: tl.constexpr, BLOCK_P: tl.constexpr):
    o_p = tl.arange(0, BLOCK_P)
    p_rows = p + o_row.to(tl.int64)[:, None] * STRIDE + o_p[None, :]
    mask = m_row[:, None]
    if BLOCK_P != P:
        mask = mask & (o_p < P)[None, :]
    tl.store(p_rows, b.to(p.dtype.element_ty), mask=mask)
