"""The outputs of each chunk, from its tokens and the state before it.

Letters: H heads, P head width, N state. A chunk is two tiles of TILE tokens; a program computes one
tile of some heads of one group. With `m` the token before the tile (nothing where the tile is the
chunk's first) and `r_i = exp2(a_i - a_m)`,

    y_i = D x_i + sum_{j <= i in the tile} (C_i . B_j) exp2(a_i - a_j) dt_j x_j
        + r_i ( sum_{j in the tile before} (C_i . B_j) exp2(a_m - a_j) dt_j x_j + e^a_m S C_i )

so that only the tile's own block needs an exponential for each pair. Every factor is at most 1.
"""

import triton
import triton.language as tl

from nemotron_v3.ops.ssd.kernels.tiles import (
    decay,
    decay_from,
    load_matrix,
    load_steps,
    load_sum,
    load_tile,
    narrow,
    store_tile,
    widen,
)


@triton.jit
def forward_kernel(
    x,
    B,
    C,
    D,
    steps,
    states,
    y,
    chunk_start,
    chunk_end,
    T,
    H,
    stride_x: tl.constexpr,
    stride_B: tl.constexpr,
    stride_C: tl.constexpr,
    stride_y: tl.constexpr,
    P: tl.constexpr,
    N: tl.constexpr,
    HEADS_OF_GROUP: tl.constexpr,
    HEADS: tl.constexpr,
    TILE: tl.constexpr,
    BLOCK_P: tl.constexpr,
    BLOCK_N: tl.constexpr,
    SKIP: tl.constexpr,
    STAGES: tl.constexpr,
    PRECISION: tl.constexpr,
):
    n_h = H // HEADS
    n_c = tl.num_programs(0) // n_h // 2
    i_h = (tl.program_id(0) % n_h).to(tl.int64) * HEADS
    i_m = (tl.program_id(0) // n_h) % 2
    i_c = (n_c - 1 - tl.program_id(0) // n_h // 2).to(tl.int64)
    i_g = i_h // HEADS_OF_GROUP
    dtype = x.dtype.element_ty
    start = tl.load(chunk_start + i_c)
    end = tl.load(chunk_end + i_c)
    t = start + i_m * TILE
    if t < end:
        o_t = tl.arange(0, TILE)
        m_i = t + o_t < end
        m_j = start + o_t < t  # the tile before, where there is one
        before = tl.maximum(t - 1, start)

        # [TILE, BLOCK_N]
        b_C = load_tile(C + t * stride_C + i_g * N, stride_C, o_t, m_i, N, BLOCK_N)
        b_B = load_tile(B + t * stride_B + i_g * N, stride_B, o_t, m_i, N, BLOCK_N)
        # [TILE, TILE]
        b_CB = tl.dot(b_C, tl.trans(b_B), input_precision=PRECISION)
        b_CB = narrow(tl.where(o_t[:, None] >= o_t[None, :], b_CB, 0.0), dtype)
        b_B = load_tile(B + start * stride_B + i_g * N, stride_B, o_t, m_j, N, BLOCK_N)
        b_CB_before = narrow(tl.dot(b_C, tl.trans(b_B), input_precision=PRECISION), dtype)

        for h in tl.range(i_h, i_h + HEADS, num_stages=STAGES):
            row = h * T
            zero = tl.minimum(row, 0).to(tl.int32)
            # [TILE, BLOCK_P], [BLOCK_P, BLOCK_N]
            p_S = states + (i_c * H + h) * (P * N)
            b_S = load_matrix(p_S, N, P, BLOCK_P, N, BLOCK_N)
            # [TILE]
            b_a, b_dt, b_ab, b_dtb = load_steps(steps, row, t, start, end - 1, TILE)
            a_m = tl.where(i_m > 0, load_sum(steps, row, before), 0.0)

            b_y = tl.dot(b_C, tl.trans(b_S), input_precision=PRECISION) * decay(a_m)
            b_c = tl.where(m_j, decay(a_m - b_ab) * b_dtb, 0.0)
            b_W = (widen(b_CB_before, zero) * b_c[None, :]).to(dtype)
            b_xb = load_tile(x + start * stride_x + h * P, stride_x, o_t, m_j, P, BLOCK_P)
            b_y = tl.dot(b_W, b_xb, acc=b_y, input_precision=PRECISION)
            b_y *= decay(b_a - a_m)[:, None]
            b_W = widen(b_CB, zero) * decay_from(b_a, b_a) * b_dt[None, :]
            if SKIP:
                m_D = o_t[:, None] == o_t[None, :] + zero
                b_W += tl.where(m_D, tl.load(D + h).to(tl.float32), 0.0)
            b_x = load_tile(x + t * stride_x + h * P, stride_x, o_t, m_i, P, BLOCK_P)
            b_y = tl.dot(b_W.to(dtype), b_x, acc=b_y, input_precision=PRECISION)
            store_tile(y + t * stride_y + h * P, stride_y, o_t, m_i, b_y, P, BLOCK_P)
