"""The gradients of all experts' matrices in one launch: products whose inner width is their rows.

Letters: R routed rows sorted by expert, E experts; M, N rows and columns of a matrix, K rows of a
step.
"""

from typing import NamedTuple

import triton
import triton.language as tl

from nemotron_v3.ops.common.dot import add_product
from nemotron_v3.ops.common.jit import kernel


class Mode(NamedTuple):
    """What `weights_kernel` is compiled for, beside its `Tiles`.

    Attributes:
        GATHER_A, GATHER_B: which side is read by token; the other is read by row.
        LIVE: rows whose weight is nothing are left out.
        DESCRIPTOR: what is read by row comes by descriptor.
        LAST_N: width of the last tile of the columns where it is not that of the others, else 0.
    """

    GATHER_A: bool
    GATHER_B: bool
    LIVE: bool
    DESCRIPTOR: bool
    LAST_N: int


@triton.jit
def _weights_tile(
    a,
    b,
    dense_desc,
    out,
    source,
    start,
    end,
    first_m,
    first_n,
    M,
    N,
    stride_a,
    stride_b,
    BLOCK_N: tl.constexpr,
    TILES: tl.constexpr,
    MODE: tl.constexpr,
):
    """`a_e^T b_e` of some rows and columns.

    No select stands between a load and its product, and what comes by descriptor has no mask. So
    the last step begins early enough to end with the expert's rows: it reads no other's, which may
    be NaN, and those that were there before are zeros on the gathered side. An expert of fewer rows
    than a step has one step, all of it masked.
    """
    o_k = tl.arange(0, TILES.k)
    o_m = first_m + tl.arange(0, TILES.m)
    o_n = first_n + tl.arange(0, BLOCK_N)
    m_m, m_n = o_m < M, o_n < N
    b_acc = tl.zeros([tl.constexpr(TILES.m), BLOCK_N], tl.float32)
    # A step ahead of the rows it points to: what a pipelined load needs must be there already.
    b_next = tl.load(source + start + o_k, mask=start + o_k < end, other=-1)
    if end - start < TILES.k:
        m_k = start + o_k < end
        if MODE.LIVE:
            m_k = b_next >= 0
        b_token = tl.where(b_next < 0, -1 - b_next, b_next)
        b_ra = b_token if MODE.GATHER_A else start + o_k
        b_rb = b_token if MODE.GATHER_B else start + o_k
        p_a = a + b_ra[:, None].to(tl.int64) * stride_a + o_m[None, :]
        p_b = b + b_rb[:, None].to(tl.int64) * stride_b + o_n[None, :]
        b_a = tl.load(p_a, mask=m_k[:, None] & m_m[None, :], other=0.0)
        b_b = tl.load(p_b, mask=m_k[:, None] & m_n[None, :], other=0.0)
        b_acc = add_product(b_acc, tl.trans(b_a), b_b, tl.constexpr(TILES.precision))
    else:
        last = end - TILES.k
        for k in tl.range(start, end, TILES.k, num_stages=TILES.stages):
            first = tl.minimum(k, last)
            b_token = b_next
            o_next = tl.minimum(k + TILES.k, last) + o_k
            b_next = tl.load(source + o_next, mask=o_next >= k + TILES.k, other=-1)
            m_k = first + o_k >= k
            if MODE.LIVE:
                m_k = b_token >= 0
            else:
                b_token = tl.where(b_token < 0, -1 - b_token, b_token)
            b_ra = b_token if MODE.GATHER_A else first + o_k
            b_rb = b_token if MODE.GATHER_B else first + o_k
            # [BLOCK_K, BLOCK_M], [BLOCK_K, BLOCK_N]
            p_a = a + b_ra[:, None].to(tl.int64) * stride_a + o_m[None, :]
            p_b = b + b_rb[:, None].to(tl.int64) * stride_b + o_n[None, :]
            if MODE.DESCRIPTOR and not MODE.GATHER_A:
                b_a = dense_desc.load([first, first_m])
            else:
                b_a = tl.load(p_a, mask=m_k[:, None] & m_m[None, :], other=0.0)
            if MODE.DESCRIPTOR and MODE.GATHER_A:
                b_b = dense_desc.load([first, first_n])
            else:
                b_b = tl.load(p_b, mask=m_k[:, None] & m_n[None, :], other=0.0)
            b_acc = add_product(b_acc, tl.trans(b_a), b_b, tl.constexpr(TILES.precision))
    p_out = out + o_m[:, None].to(tl.int64) * N + o_n[None, :]
    tl.store(p_out, b_acc.to(out.dtype.element_ty), mask=m_m[:, None] & m_n[None, :])


@kernel
def weights_kernel(
    a,
    b,
    dense_desc,
    last_desc,
    out,
    source,
    offsets,
    M,
    N,
    stride_a,
    stride_b,
    TILES: tl.constexpr,
    MODE: tl.constexpr,
):
    """`out[e] = a_e^T b_e` over the rows of expert e: `[E, M, N]`; zeros for one without rows.

    At most one of a and b is read by token, the other by row. Where LIVE, rows whose weight is
    nothing are left out; where LAST_N is not 0, the last tile of the columns is that wide.
    """
    tiles_m, tiles_n = tl.cdiv(M, TILES.m), tl.cdiv(N, TILES.n)
    of_expert = tiles_m * tiles_n
    i = tl.program_id(0)
    expert = i // of_expert
    within = i % of_expert
    tile_n = within % tiles_n
    first_m, first_n = (within // tiles_n) * TILES.m, tile_n * TILES.n
    start, end = tl.load(offsets + expert), tl.load(offsets + expert + 1)
    p_out = out + expert.to(tl.int64) * M * N
    rows = (source, start, end)
    tile = (first_m, first_n, M, N, stride_a, stride_b)
    if MODE.LAST_N > 0 and tile_n == tiles_n - 1:
        _weights_tile(a, b, last_desc, p_out, *rows, *tile, MODE.LAST_N, TILES, MODE)
    else:
        _weights_tile(a, b, dense_desc, p_out, *rows, *tile, TILES.n, TILES, MODE)
