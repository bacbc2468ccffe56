"""Gradients of x, B and C, chunk by chunk.

Letters as in scan.py; S the state before the chunk, dS the gradient of the state after it. One
launch of programs of three kinds: they share what they read, x, dy, S and dS, and neighbours in
the launch find it in the second-level cache. None leaves partial sums: a program of dB or dC takes
all heads of its group in order.

Kernels begin where the one before them ended, with the first chunk or the last one, for the same
reason.
"""

import triton
import triton.language as tl

from nemotron_v3.ops.common.dot import add_product
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


@triton.jit
def _dC(
    B,
    C,
    steps,
    states,
    dy,
    dM,
    dC,
    from_state,
    i_c,
    i_m,
    i_g,
    start,
    length,
    T,
    H,
    stride_B: tl.constexpr,
    stride_C: tl.constexpr,
    stride_dy: tl.constexpr,
    stride_dC: tl.constexpr,
    P: tl.constexpr,
    N: tl.constexpr,
    HEADS_OF_GROUP: tl.constexpr,
    TILE: tl.constexpr,
    BLOCK_P: tl.constexpr,
    BLOCK_N: tl.constexpr,
    STAGES: tl.constexpr,
    PRECISION: tl.constexpr,
):
    """dC of a tile of tokens i, from the tokens j of its chunk and the state before it:

        dC_i = sum_{j <= i} dM_ij B_j + sum_h e^a_i S^T dy_i

    Also the weight of what y_i takes from S (`from_state`).
    """
    n_g = H // HEADS_OF_GROUP
    dtype = dy.dtype.element_ty
    o = i_m * TILE
    t = start + o
    o_t = tl.arange(0, TILE)
    m_i = o + o_t < length

    # [TILE, BLOCK_N]
    b_C = load_tile(C + t * stride_C + i_g * N, stride_C, o_t, m_i, N, BLOCK_N)
    b_dC = tl.zeros([TILE, BLOCK_N], tl.float32)

    first_head = i_g * HEADS_OF_GROUP
    for h in tl.range(first_head, first_head + HEADS_OF_GROUP, num_stages=STAGES):
        # [TILE, BLOCK_P], [BLOCK_P, BLOCK_N], [TILE]
        b_dy = load_tile(dy + t * stride_dy + h * P, stride_dy, o_t, m_i, P, BLOCK_P)
        b_S = load_state(states + (i_c * H + h) * (P * N), P, N, BLOCK_P, BLOCK_N, dtype)
        b_e = decay(tl.load(steps + (h * T + start + tl.minimum(o + o_t, length - 1)) * 2))
        b_dye = b_dy.to(tl.float32) * b_e[:, None]
        b_from = tl.dot(b_C, tl.trans(b_S), input_precision=PRECISION)
        tl.store(from_state + h * T + t + o_t, tl.sum(b_from * b_dye, 1), mask=m_i)
        b_dC = add_product(b_dC, b_dye.to(dtype), b_S, PRECISION)

    # [TILE, TILE], [TILE, BLOCK_N]: the tile itself, and the one before it
    o_tile = o_t[:, None] * TILE + o_t[None, :]
    b_dM = tl.load(dM + ((i_c * 3 + i_m) * n_g + i_g) * (TILE * TILE) + o_tile)
    b_B = load_tile(B + t * stride_B + i_g * N, stride_B, o_t, m_i, N, BLOCK_N)
    b_dC = add_product(b_dC, b_dM, b_B, PRECISION)
    if i_m == 1:
        m_j = o_t < length
        b_dM = tl.load(dM + ((i_c * 3 + 2) * n_g + i_g) * (TILE * TILE) + o_tile)
        b_B = load_tile(B + start * stride_B + i_g * N, stride_B, o_t, m_j, N, BLOCK_N)
        b_dC = add_product(b_dC, b_dM, b_B, PRECISION)
    store_tile(dC + t * stride_dC + i_g * N, stride_dC, o_t, m_i, b_dC, N, BLOCK_N)


@triton.jit
def _dB(
    x,
    C,
    steps,
    states,
    dstates,
    dM,
    dB,
    through,
    i_c,
    i_m,
    i_g,
    start,
    length,
    T,
    H,
    stride_x: tl.constexpr,
    stride_C: tl.constexpr,
    stride_dB: tl.constexpr,
    P: tl.constexpr,
    N: tl.constexpr,
    HEADS_OF_GROUP: tl.constexpr,
    TILE: tl.constexpr,
    BLOCK_P: tl.constexpr,
    BLOCK_N: tl.constexpr,
    STAGES: tl.constexpr,
    PRECISION: tl.constexpr,
):
    """dB of a tile of tokens j, from the tokens i of its chunk and the state behind it:

        dB_j = sum_{i >= j} dM_ij C_i + sum_h dt_j e^(a_last - a_j) dS^T x_j

    Also, row by row of the state, the weight of what goes from before the chunk to behind it
    (`through`); each of the two tiles does half of the rows.
    """
    n_g = H // HEADS_OF_GROUP
    dtype = x.dtype.element_ty
    o = i_m * TILE
    t = start + o
    o_t = tl.arange(0, TILE)
    m_j = o + o_t < length
    # [HALF, BLOCK_N]
    HALF: tl.constexpr = BLOCK_P // 2
    o_half = i_m * HALF + tl.arange(0, HALF)
    o_n = tl.arange(0, BLOCK_N)
    o_rows = o_half[:, None] * N + o_n[None, :]
    m_rows = (o_half < P)[:, None] & (o_n < N)[None, :]

    b_dB = tl.zeros([TILE, BLOCK_N], tl.float32)
    first_head = i_g * HEADS_OF_GROUP
    for h in tl.range(first_head, first_head + HEADS_OF_GROUP, num_stages=STAGES):
        row = h * T + start
        o_S = (i_c * H + h) * (P * N)
        # [TILE, BLOCK_P], [BLOCK_P, BLOCK_N], [TILE]
        b_x = load_tile(x + t * stride_x + h * P, stride_x, o_t, m_j, P, BLOCK_P)
        b_dS = load_state(dstates + o_S, P, N, BLOCK_P, BLOCK_N, dtype)
        p_steps = steps + (row + tl.minimum(o + o_t, length - 1)) * 2
        a_last = load_sum(steps, row, length - 1)
        b_w = decay(a_last - tl.load(p_steps)) * tl.load(p_steps + 1).to(tl.float32)
        b_xw = (b_x.to(tl.float32) * b_w[:, None]).to(dtype)
        b_dB = add_product(b_dB, b_xw, b_dS, PRECISION)
        b_S = tl.load(states + o_S + o_rows, mask=m_rows, other=0.0).to(tl.float32)
        b_dS = tl.load(dstates + o_S + o_rows, mask=m_rows, other=0.0).to(tl.float32)
        b_through = tl.sum(b_S * b_dS, 1) * decay(a_last)
        tl.store(through + (i_c * H + h) * BLOCK_P + o_half, b_through)

    # [TILE, TILE], [TILE, BLOCK_N]: the tile itself, and the one after it
    o_tile = o_t[:, None] * TILE + o_t[None, :]
    b_dM = tl.load(dM + ((i_c * 3 + i_m) * n_g + i_g) * (TILE * TILE) + o_tile)
    b_C = load_tile(C + t * stride_C + i_g * N, stride_C, o_t, m_j, N, BLOCK_N)
    b_dB = add_product(b_dB, tl.trans(b_dM), b_C, PRECISION)
    if i_m == 0:
        m_i = TILE + o_t < length
        b_dM = tl.load(dM + ((i_c * 3 + 2) * n_g + i_g) * (TILE * TILE) + o_tile)
        p_C = C + (t + TILE) * stride_C + i_g * N
        b_C = load_tile(p_C, stride_C, o_t, m_i, N, BLOCK_N)
        b_dB = add_product(b_dB, tl.trans(b_dM), b_C, PRECISION)
    store_tile(dB + t * stride_dB + i_g * N, stride_dB, o_t, m_j, b_dB, N, BLOCK_N)


@triton.jit
def _dx(
    x,
    B,
    C,
    D,
    steps,
    dstates,
    dy,
    dx,
    to_state,
    skip,
    i_c,
    i_h,
    start,
    length,
    T,
    H,
    stride_x: tl.constexpr,
    stride_B: tl.constexpr,
    stride_C: tl.constexpr,
    stride_dy: tl.constexpr,
    stride_dx: tl.constexpr,
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
    FIRST: tl.constexpr,
):
    """dx of a tile of tokens j, from the tokens i of the same tile and of the one after.

    Everything lies transposed, `[j, i]`. With `v_j` the gradient of `dt_j x_j` and `m` the tile's
    last token, so that every factor is at most 1,

        v_j = sum_{i >= j in the tile} (B_j . C_i) e^(a_i - a_j) dy_i
            + e^(a_m - a_j) ( sum_{i in the tile after} (B_j . C_i) e^(a_i - a_m) dy_i
                            + e^(a_last - a_m) dS B_j )

    and dx_j = dt_j v_j + D dy_j. For the steps it leaves the weight of what j leaves in the state,
    over dt_j (`to_state`), and dy_j . x_j (`skip`). FIRST: of the two tiles; the second has none
    after it.
    """
    i_g = i_h // HEADS_OF_GROUP
    dtype = x.dtype.element_ty
    o: tl.constexpr = 0 if FIRST else TILE
    o_t = tl.arange(0, TILE)
    m_j = o + o_t < length
    m_i = TILE + o_t < length  # the tile after
    middle = tl.minimum(TILE, length) - 1
    x += (start + o) * stride_x
    dy += (start + o) * stride_dy
    dx += (start + o) * stride_dx
    B += (start + o) * stride_B + i_g * N
    C += (start + o) * stride_C + i_g * N

    # [TILE, BLOCK_N]
    b_B = load_tile(B, stride_B, o_t, m_j, N, BLOCK_N)
    b_C = load_tile(C, stride_C, o_t, m_j, N, BLOCK_N)
    # [TILE, TILE]
    b_BC = tl.dot(b_B, tl.trans(b_C), input_precision=PRECISION)
    b_BC = tl.where(o_t[:, None] <= o_t[None, :], b_BC, 0.0)
    if FIRST:
        b_C = load_tile(C + TILE * stride_C, stride_C, o_t, m_i, N, BLOCK_N)
        b_BC_after = tl.dot(b_B, tl.trans(b_C), input_precision=PRECISION)

    # What the weights of pairs need is loaded a head ahead, as in scan.py.
    row = i_h * T + start
    n_steps = load_steps(steps + row * 2, o, o + TILE, length, TILE)
    n_last = load_sum(steps, row, length - 1)
    n_m = load_sum(steps, row, middle) if FIRST else n_last
    for h in tl.range(i_h, i_h + HEADS, num_stages=STAGES):
        row = h * T + start
        # [TILE]
        b_a, b_dt, b_aa, _ = split_steps(n_steps)
        a_m = n_m
        a_last = n_last
        n_row = tl.minimum(h + 1, i_h + HEADS - 1) * T + start
        n_steps = load_steps(steps + n_row * 2, o, o + TILE, length, TILE)
        n_last = load_sum(steps, n_row, length - 1)
        n_m = load_sum(steps, n_row, middle) if FIRST else n_last

        # [TILE, TILE]
        b_W = (b_BC * decay_down(b_a[None, :] - b_a[:, None])).to(dtype)

        # the state
        b_dS = load_state(dstates + (i_c * H + h) * (P * N), P, N, BLOCK_P, BLOCK_N, dtype)
        b_x = load_tile(x + h * P, stride_x, o_t, m_j, P, BLOCK_P).to(tl.float32)
        b_dx = tl.dot(b_B, tl.trans(b_dS), input_precision=PRECISION)
        b_to = tl.sum(b_dx * b_x, 1) * decay(a_last - b_a)
        tl.store(to_state + row + o + o_t, b_to, mask=m_j)

        if FIRST:  # the tile after
            b_W_after = (b_BC_after * decay(b_aa - a_m)[None, :]).to(dtype)
            b_dy = load_tile(dy + TILE * stride_dy + h * P, stride_dy, o_t, m_i, P, BLOCK_P)
            b_dx *= decay(a_last - a_m)
            b_dx = tl.dot(b_W_after, b_dy, acc=b_dx, input_precision=PRECISION)
        b_dx *= decay(a_m - b_a)[:, None]

        # the tile itself
        b_dy = load_tile(dy + h * P, stride_dy, o_t, m_j, P, BLOCK_P)
        b_dx = tl.dot(b_W, b_dy, acc=b_dx, input_precision=PRECISION)
        b_dx *= b_dt[:, None]
        b_dy = b_dy.to(tl.float32)
        tl.store(skip + row + o + o_t, tl.sum(b_x * b_dy, 1), mask=m_j)
        if SKIP:
            b_dx += tl.load(D + h).to(tl.float32) * b_dy
        store_tile(dx + h * P, stride_dx, o_t, m_j, b_dx, P, BLOCK_P)


@kernel
def gradients_kernel(
    x,
    B,
    C,
    D,
    steps,
    states,
    dstates,
    dy,
    dM,
    dx,
    dB,
    dC,
    from_state,
    to_state,
    skip,
    through,
    chunk_start,
    chunk_end,
    T,
    H,
    stride_x: tl.constexpr,
    stride_B: tl.constexpr,
    stride_C: tl.constexpr,
    stride_dy: tl.constexpr,
    stride_dx: tl.constexpr,
    stride_dB: tl.constexpr,
    stride_dC: tl.constexpr,
    P: tl.constexpr,
    N: tl.constexpr,
    HEADS_OF_GROUP: tl.constexpr,
    HEADS: tl.constexpr,
    TILE: tl.constexpr,
    BLOCK_P: tl.constexpr,
    BLOCK_N: tl.constexpr,
    SKIP: tl.constexpr,
    STAGES_dx: tl.constexpr,
    STAGES_dB: tl.constexpr,
    STAGES_dC: tl.constexpr,
    PRECISION: tl.constexpr,
):
    """Chunk by chunk from the first, where the pairs end: programs of dx, dB and dC."""
    n_g = H // HEADS_OF_GROUP
    n_h = H // HEADS
    n_of_chunk = 2 * (n_h + 2 * n_g)
    i_c = (tl.program_id(0) // n_of_chunk).to(tl.int64)
    i = tl.program_id(0) % n_of_chunk
    start = tl.load(chunk_start + i_c)
    length = (tl.load(chunk_end + i_c) - start).to(tl.int32)
    if i < 2 * n_h:
        i_h = (i % n_h).to(tl.int64) * HEADS
        if i < n_h:
            _dx(
                *(x, B, C, D, steps, dstates, dy, dx, to_state, skip),
                *(i_c, i_h, start, length, T, H),
                *(stride_x, stride_B, stride_C, stride_dy, stride_dx, P, N, HEADS_OF_GROUP, HEADS),
                *(TILE, BLOCK_P, BLOCK_N, SKIP, STAGES_dx, PRECISION, True),
            )
        elif length > TILE:
            _dx(
                *(x, B, C, D, steps, dstates, dy, dx, to_state, skip),
                *(i_c, i_h, start, length, T, H),
                *(stride_x, stride_B, stride_C, stride_dy, stride_dx, P, N, HEADS_OF_GROUP, HEADS),
                *(TILE, BLOCK_P, BLOCK_N, SKIP, STAGES_dx, PRECISION, False),
            )
    elif i < 2 * (n_h + n_g):
        i -= 2 * n_h
        _dB(
            x,
            C,
            steps,
            states,
            dstates,
            dM,
            dB,
            through,
            i_c,
            i // n_g,
            (i % n_g).to(tl.int64),
            start,
            length,
            T,
            H,
            stride_x,
            stride_C,
            stride_dB,
            P,
            N,
            HEADS_OF_GROUP,
            TILE,
            BLOCK_P,
            BLOCK_N,
            STAGES_dB,
            PRECISION,
        )
    else:
        i -= 2 * (n_h + n_g)
        _dC(
            B,
            C,
            steps,
            states,
            dy,
            dM,
            dC,
            from_state,
            i_c,
            i // n_g,
            (i % n_g).to(tl.int64),
            start,
            length,
            T,
            H,
            stride_B,
            stride_C,
            stride_dy,
            stride_dC,
            P,
            N,
            HEADS_OF_GROUP,
            TILE,
            BLOCK_P,
            BLOCK_N,
            STAGES_dC,
            PRECISION,
        )
