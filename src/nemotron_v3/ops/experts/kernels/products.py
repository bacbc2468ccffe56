"""The sorted rows of all experts times their matrices, in one launch.

Letters: R routed rows sorted by expert, E experts; N columns of a product, K its inner width. A row
may be read where its token lies (`GATHER`), a product of few columns a row may be added (`LOW`:
the second half of a low-rank update), and what follows is applied to the accumulator before it is
stored (`EPILOGUE`, README.md).
"""

from typing import Any, NamedTuple

import triton
import triton.language as tl

from nemotron_v3.ops.common.dot import add_product
from nemotron_v3.ops.common.jit import kernel

UP = tl.constexpr(0)
PLAIN = tl.constexpr(1)
DOWN_BACKWARD = tl.constexpr(2)
SCALED = tl.constexpr(3)


@triton.jit
def _scale(b_w, FLOOR: tl.constexpr):
    """What a row's hidden values are stored times: its weight, or 1 where that is nothing."""
    return tl.where(tl.abs(b_w) < FLOOR, 1.0, b_w)


@triton.jit
def _split(b_x, PARTS: tl.constexpr):
    """The columns of `b_x` in 1, 2 or 4 parts."""
    M: tl.constexpr = b_x.shape[0]
    N: tl.constexpr = b_x.shape[1]
    if PARTS == 1:
        return (b_x,)
    else:
        b_low, b_high = tl.split(tl.permute(tl.reshape(b_x, (M, 2, N // 2)), (0, 2, 1)))
        if PARTS == 2:
            return (b_low, b_high)
        else:
            return _split(b_low, PARTS // 2) + _split(b_high, PARTS // 2)


@triton.jit
def _multiply(
    p_a,
    p_b,
    b_desc,
    row_b,
    i_n,
    m_n,
    K,
    stride_b,
    DTYPE: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    TILES: tl.constexpr,
    MODE: tl.constexpr,
):
    """`[BLOCK_M, BLOCK_N]` in fp32: the rows at `p_a` times the expert's matrix.

    The matrix lies as `[N, K]`, or as `[K, N]` where TRANSPOSED.
    """
    o_k = tl.arange(0, TILES.k)
    o_n = tl.arange(0, BLOCK_N)
    b_acc = tl.zeros([BLOCK_M, BLOCK_N], tl.float32)
    for k in tl.range(0, K, TILES.k, num_stages=TILES.stages):
        # [BLOCK_M, BLOCK_K]
        if MODE.EVEN_K:
            b_a = tl.load(p_a[:, None] + (k + o_k)[None, :])
        else:
            b_a = tl.load(p_a[:, None] + (k + o_k)[None, :], mask=(k + o_k < K)[None, :], other=0.0)
        # [BLOCK_K, BLOCK_N]
        if MODE.DESCRIPTOR:
            b_b = b_desc.load([row_b + k, i_n]) if MODE.TRANSPOSED else b_desc.load([row_b, k]).T
        else:
            if MODE.TRANSPOSED:
                p = p_b + (k + o_k)[:, None].to(tl.int64) * stride_b + o_n[None, :]
            else:
                p = p_b + o_n[None, :].to(tl.int64) * stride_b + (k + o_k)[:, None]
            m_b = m_n[None, :]
            if not MODE.EVEN_K:
                m_b = m_b & (k + o_k < K)[:, None]
            b_b = tl.load(p, mask=m_b, other=0.0)
        b_acc = add_product(b_acc, b_a.to(DTYPE), b_b.to(DTYPE), TILES.precision)
    return b_acc


@triton.jit
def _add_low_rank(
    b_acc,
    low_a,
    low_b,
    b_row,
    i_n,
    m_n,
    rank,
    stride_low,
    DTYPE: tl.constexpr,
    BLOCK_N: tl.constexpr,
    TILES: tl.constexpr,
    MODE: tl.constexpr,
):
    """`b_acc` plus the rows `b_row` of `low_a` `[R, rank]` times the expert's matrix at `low_b`.

    It lies as `[N, rank]`, or as `[rank, N]` where TRANSPOSED.
    """
    o_k = tl.arange(0, MODE.LOW)
    o_n = i_n + tl.arange(0, BLOCK_N)
    for k in tl.range(0, rank, MODE.LOW, num_stages=1):
        m_k = k + o_k < rank
        # [BLOCK_M, LOW], [LOW, BLOCK_N]
        p_a = low_a + b_row[:, None].to(tl.int64) * rank + (k + o_k)[None, :]
        b_a = tl.load(p_a, mask=m_k[None, :], other=0.0)
        if MODE.TRANSPOSED:
            p_b = low_b + (k + o_k)[:, None].to(tl.int64) * stride_low + o_n[None, :]
        else:
            p_b = low_b + o_n[None, :].to(tl.int64) * stride_low + (k + o_k)[:, None]
        b_b = tl.load(p_b, mask=m_k[:, None] & m_n[None, :], other=0.0)
        b_acc = add_product(b_acc, b_a.to(DTYPE), b_b.to(DTYPE), TILES.precision)
    return b_acc


@triton.jit
def _rows_tile(
    tensors,
    sizes,
    b_desc,
    start,
    end,
    expert,
    tile_n,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    PARTS: tl.constexpr,
    TILES: tl.constexpr,
    MODE: tl.constexpr,
):
    o_m = start + tl.arange(0, BLOCK_M)
    m_m = o_m < end
    first_n = tile_n * TILES.n
    o_n = first_n + tl.arange(0, BLOCK_N)
    m_n = o_n < sizes.N
    # [BLOCK_M]; rows past the end read some row of another, and are not stored
    if MODE.GATHER:
        b_row = tl.load(tensors.source + o_m, mask=m_m, other=0)
        b_row = tl.where(b_row < 0, -1 - b_row, b_row)
    else:
        b_row = tl.minimum(o_m, sizes.R - 1)
    p_a = tensors.a + b_row.to(tl.int64) * sizes.stride_a
    i_n = sizes.column + first_n
    p_b = tensors.b + expert.to(tl.int64) * sizes.stride_expert
    if MODE.TRANSPOSED:
        p_b += i_n
        row_b = expert * sizes.rows_b
    else:
        p_b += i_n.to(tl.int64) * sizes.stride_b
        row_b = expert * sizes.rows_b + i_n
    dtype = tensors.out.dtype.element_ty
    b_acc = _multiply(
        *(p_a, p_b, b_desc, row_b, i_n, m_n, sizes.K, sizes.stride_b),
        *(dtype, BLOCK_M, BLOCK_N, TILES, MODE),
    )
    if MODE.LOW > 0:
        p_low = tensors.low_b + expert.to(tl.int64) * sizes.stride_low_expert
        b_low_row = tl.minimum(o_m, sizes.R - 1)
        b_acc = _add_low_rank(
            *(b_acc, tensors.low_a, p_low, b_low_row, i_n, m_n, sizes.rank, sizes.stride_low),
            *(dtype, BLOCK_N, TILES, MODE),
        )
    if MODE.EPILOGUE == DOWN_BACKWARD:
        # In parts: the accumulator and what it meets do not fit into the registers together.
        PART: tl.constexpr = BLOCK_N // PARTS
        b_w = tl.load(tensors.weights + o_m, mask=m_m, other=0.0)
        b_inverse = 1.0 / _scale(b_w, MODE.FLOOR)
        b_sum = tl.zeros([BLOCK_M], tl.float32)
        parts = _split(b_acc, PARTS)
        for i in tl.static_range(PARTS):
            o_p = first_n + i * PART + tl.arange(0, PART)
            m_mp = m_m[:, None] & (o_p < sizes.N)[None, :]
            # [BLOCK_M, PART]
            p_h = tensors.hidden + o_m[:, None].to(tl.int64) * sizes.stride_hidden + o_p[None, :]
            b_h = tl.load(p_h, mask=m_mp, other=0.0).to(tl.float32) * b_inverse[:, None]
            b_part = tl.where((o_p < sizes.N)[None, :], parts[i], 0.0)
            b_sum += tl.sum(b_part * b_h, 1)
            b_du = b_part * tl.sqrt(b_h) * (2.0 * b_w)[:, None]
            p_out = tensors.out + o_m[:, None].to(tl.int64) * sizes.stride_out + o_p[None, :]
            tl.store(p_out, b_du.to(tensors.out.dtype.element_ty), mask=m_mp)
        tl.store(tensors.partial + tile_n.to(tl.int64) * sizes.R + o_m, b_sum, mask=m_m)
    else:
        if MODE.EPILOGUE == UP:
            b_w = tl.load(tensors.weights + o_m, mask=m_m, other=0.0)
            b_relu = tl.where(b_acc <= 0.0, 0.0, b_acc)  # NaN stays
            b_acc = _scale(b_w, MODE.FLOOR)[:, None] * b_relu * b_relu
        if MODE.EPILOGUE == SCALED:
            b_acc *= sizes.scale
        p_out = tensors.out + o_m[:, None].to(tl.int64) * sizes.stride_out + o_n[None, :]
        tl.store(p_out, b_acc.to(tensors.out.dtype.element_ty), mask=m_m[:, None] & m_n[None, :])


class Tensors(NamedTuple):
    """What `rows_kernel` reads and writes; None where there is none.

    Rows `a`, the experts' matrices `b` and the products `out`; `hidden` and `partial` of the
    epilogue DOWN_BACKWARD; a low-rank update's rows `low_a` and matrices `low_b`; and where rows
    lie (`launch.Sorted`).
    """

    a: Any
    b: Any
    out: Any
    hidden: Any
    partial: Any
    low_a: Any
    low_b: Any
    source: Any
    weights: Any


class Sizes(NamedTuple):
    """Numbers of one product; `column` is its first column among those of the matrices.

    A matrix has `rows_b` rows, of `stride_b` elements each; `rank` is that of a low-rank update and
    `scale` that of the epilogue SCALED.
    """

    R: Any
    N: Any
    K: Any
    column: Any
    stride_a: Any
    stride_expert: Any
    stride_b: Any
    rows_b: Any
    stride_out: Any
    stride_hidden: Any
    rank: Any
    stride_low_expert: Any
    stride_low: Any
    scale: Any


class Mode(NamedTuple):
    """What `rows_kernel` is compiled for, beside its `Tiles`.

    Attributes:
        EPILOGUE: what follows a product.
        FLOOR: below it a weight is nothing.
        GATHER: rows are read where their tokens lie.
        TRANSPOSED: matrices lie as `[K, N]`, not as `[N, K]`.
        DESCRIPTOR: matrices come by descriptor.
        LAST_N: width of the last tile of the columns where it is not that of the others, else 0.
        EVEN_K: K is a multiple of a tile's.
        LOW: columns of a step through a low-rank update's rank; 0 where there is none.
    """

    EPILOGUE: int
    FLOOR: float
    GATHER: bool
    TRANSPOSED: bool
    DESCRIPTOR: bool
    LAST_N: int
    EVEN_K: bool
    LOW: int


@kernel
def rows_kernel(
    a,
    b,
    b_desc,
    last_desc,
    out,
    hidden,
    partial,
    low_a,
    low_b,
    source,
    weights,
    offsets,
    tile_first,
    tile_expert,
    E,
    R,
    N,
    K,
    column,
    stride_a,
    stride_expert,
    stride_b,
    rows_b,
    stride_out,
    stride_hidden,
    rank,
    stride_low_expert,
    stride_low,
    scale,
    TILES: tl.constexpr,
    MODE: tl.constexpr,
):
    """Every expert's rows times its matrix, a tile a program.

    Tiles that share a part of a matrix are neighbours, so that it comes from memory once. An
    expert's last rows are a tile of half the height if they fit into one; where LAST_N is not 0,
    the last tile of the columns is that wide.
    """
    tiles_n = tl.cdiv(N, TILES.n)
    total = tl.load(tile_first + E) * tiles_n
    i = tl.program_id(0)
    if i < total:
        expert = tl.load(tile_expert + i // tiles_n)
        first = tl.load(tile_first + expert)
        tiles_m = tl.load(tile_first + expert + 1) - first
        within = i - first * tiles_n
        tile_n = within // tiles_m
        start = tl.load(offsets + expert) + (within % tiles_m) * TILES.m
        end = tl.minimum(tl.load(offsets + expert + 1), start + TILES.m)
        tensors = Tensors(a, b, out, hidden, partial, low_a, low_b, source, weights)
        sizes = Sizes(
            *(R, N, K, column, stride_a, stride_expert, stride_b, rows_b, stride_out),
            *(stride_hidden, rank, stride_low_expert, stride_low, scale),
        )
        place = (start, end, expert, tile_n)
        if MODE.LAST_N > 0 and tile_n == tiles_n - 1:
            _rows_tile(tensors, sizes, last_desc, *place, TILES.m, MODE.LAST_N, 1, TILES, MODE)
        elif end - start <= TILES.m // 2:
            HALF: tl.constexpr = TILES.m // 2
            _rows_tile(tensors, sizes, b_desc, *place, HALF, TILES.n, TILES.parts, TILES, MODE)
        else:
            _rows_tile(tensors, sizes, b_desc, *place, TILES.m, TILES.n, TILES.parts, TILES, MODE)
