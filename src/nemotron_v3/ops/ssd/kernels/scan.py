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

from nemotron_v3.ops.common.jit import kernel
from nemotron_v3.ops.ssd.kernels.loads import (
    decay,
    decay_down,
    load_state,
    load_steps,
    load_sum,
    load_tile,
    split_steps,
    store_tile,
)


@kernel
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
    STAGES: tl.constexpr,
    PRECISION: tl.constexpr,
):
    """Chunks from the last, where the sweep of the states has ended: the second-level cache still
    holds what it read and stored there.
    """
    n_programs = H // HEADS
    n_c = tl.num_programs(0) // n_programs // 2
    i_h = (tl.program_id(0) % n_programs).to(tl.int64) * HEADS
    i_m = (tl.program_id(0) // n_programs) % 2
    i_c = (n_c - 1 - tl.program_id(0) // n_programs // 2).to(tl.int64)
    start = tl.load(chunk_start + i_c)
    length = (tl.load(chunk_end + i_c) - start).to(tl.int32)
    if i_m == 0:
        _outputs(
            *(x, B, C, D, steps, states, y, i_c, i_h, start, length, T, H),
            *(stride_x, stride_B, stride_C, stride_y, P, N, HEADS_OF_GROUP, HEADS),
            *(TILE, BLOCK_P, BLOCK_N, STAGES, PRECISION, True),
        )
    elif length > TILE:
        _outputs(
            *(x, B, C, D, steps, states, y, i_c, i_h, start, length, T, H),
            *(stride_x, stride_B, stride_C, stride_y, P, N, HEADS_OF_GROUP, HEADS),
            *(TILE, BLOCK_P, BLOCK_N, STAGES, PRECISION, False),
        )


@triton.jit
def _outputs(
    x,
    B,
    C,
    D,
    steps,
    states,
    y,
    i_c,
    i_h,
    start,
    length,
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
    STAGES: tl.constexpr,
    PRECISION: tl.constexpr,
    FIRST: tl.constexpr,
):
    """FIRST: of the two tiles."""
    i_g = i_h // HEADS_OF_GROUP
    dtype = x.dtype.element_ty
    o: tl.constexpr = 0 if FIRST else TILE
    o_t = tl.arange(0, TILE)
    m_i = o + o_t < length
    x += start * stride_x
    y += (start + o) * stride_y
    B += start * stride_B + i_g * N
    C += (start + o) * stride_C + i_g * N

    # [TILE, BLOCK_N]
    b_C = load_tile(C, stride_C, o_t, m_i, N, BLOCK_N)
    b_B = load_tile(B + o * stride_B, stride_B, o_t, m_i, N, BLOCK_N)
    # [TILE, TILE]
    b_CB = tl.dot(b_C, tl.trans(b_B), input_precision=PRECISION)
    b_CB = tl.where(o_t[:, None] >= o_t[None, :], b_CB, 0.0)
    if not FIRST:
        b_B = load_tile(B, stride_B, o_t, o_t < TILE, N, BLOCK_N)
        b_CB_before = tl.dot(b_C, tl.trans(b_B), input_precision=PRECISION)

    # What the weights of pairs need is loaded a head ahead, into registers: they are computed
    # while the tiles of the head come.
    row = i_h * T + start
    n_steps = load_steps(steps + row * 2, o, 0, length, TILE)
    n_m = 0.0
    if not FIRST:
        n_m = load_sum(steps, row, o - 1)
    n_D = 0.0
    if D is not None:
        n_D = tl.load(D + i_h).to(tl.float32)
    for h in tl.range(i_h, i_h + HEADS, num_stages=STAGES):
        # [TILE]
        b_a, b_dt, b_ab, b_dtb = split_steps(n_steps)
        a_m = n_m
        b_D = n_D
        n_h = tl.minimum(h + 1, i_h + HEADS - 1)
        row = n_h * T + start
        n_steps = load_steps(steps + row * 2, o, 0, length, TILE)
        if not FIRST:
            n_m = load_sum(steps, row, o - 1)
        if D is not None:
            n_D = tl.load(D + n_h).to(tl.float32)

        # [TILE, TILE]
        b_W = b_CB * decay_down(b_a[:, None] - b_a[None, :]) * b_dt[None, :]
        if D is not None:
            b_W += tl.where(o_t[:, None] == o_t[None, :], b_D, 0.0)
        b_W = b_W.to(dtype)

        # [TILE, BLOCK_P], [BLOCK_P, BLOCK_N]
        p_S = states + (i_c * H + h) * (P * N)
        b_S = load_state(p_S, P, N, BLOCK_P, BLOCK_N, dtype)
        b_x = load_tile(x + o * stride_x + h * P, stride_x, o_t, m_i, P, BLOCK_P)
        b_y = tl.dot(b_C, tl.trans(b_S), input_precision=PRECISION)
        if FIRST:
            b_y *= decay(b_a)[:, None]
        else:
            b_c = decay(a_m - b_ab) * b_dtb
            b_W_before = (b_CB_before * b_c[None, :]).to(dtype)
            b_xb = load_tile(x + h * P, stride_x, o_t, o_t < TILE, P, BLOCK_P)
            b_y = tl.dot(b_W_before, b_xb, acc=b_y * decay(a_m), input_precision=PRECISION)
            b_y *= decay(b_a - a_m)[:, None]
        b_y = tl.dot(b_W, b_x, acc=b_y, input_precision=PRECISION)
        store_tile(y + h * P, stride_y, o_t, m_i, b_y, P, BLOCK_P)
