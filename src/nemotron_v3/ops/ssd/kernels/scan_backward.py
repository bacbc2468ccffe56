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
    end,
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
    t = start + i_m * TILE
    o_t = tl.arange(0, TILE)
    m_i = t + o_t < end

    # [TILE, BLOCK_N]
    b_C = load_tile(C + t * stride_C + i_g * N, stride_C, o_t, m_i, N, BLOCK_N)
    b_dC = tl.zeros([TILE, BLOCK_N], tl.float32)

    first_head = i_g * HEADS_OF_GROUP
    for h in tl.range(first_head, first_head + HEADS_OF_GROUP, num_stages=STAGES):
        # [TILE, BLOCK_P], [BLOCK_P, BLOCK_N], [TILE]
        b_dy = load_tile(dy + t * stride_dy + h * P, stride_dy, o_t, m_i, P, BLOCK_P)
        b_S = load_matrix(states + (i_c * H + h) * (P * N), N, P, BLOCK_P, N, BLOCK_N)
        b_e = decay(tl.load(steps + (h * T + tl.minimum(t + o_t, end - 1)) * 2))
        b_dye = b_dy.to(tl.float32) * b_e[:, None]
        b_from = tl.dot(b_C, tl.trans(b_S), input_precision=PRECISION)
        tl.store(from_state + h * T + t + o_t, tl.sum(b_from * b_dye, 1), mask=m_i)
        b_dC = tl.dot(b_dye.to(dtype), b_S, acc=b_dC, input_precision=PRECISION)

    # [TILE, TILE], [TILE, BLOCK_N]: the tile itself, and the one before it
    o_tile = o_t[:, None] * TILE + o_t[None, :]
    b_dM = tl.load(dM + ((i_c * 3 + i_m) * n_g + i_g) * (TILE * TILE) + o_tile)
    b_B = load_tile(B + t * stride_B + i_g * N, stride_B, o_t, m_i, N, BLOCK_N)
    b_dC = tl.dot(b_dM, b_B, acc=b_dC, input_precision=PRECISION)
    if i_m == 1:
        m_j = start + o_t < end
        b_dM = tl.load(dM + ((i_c * 3 + 2) * n_g + i_g) * (TILE * TILE) + o_tile)
        b_B = load_tile(B + start * stride_B + i_g * N, stride_B, o_t, m_j, N, BLOCK_N)
        b_dC = tl.dot(b_dM, b_B, acc=b_dC, input_precision=PRECISION)
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
    end,
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
    t = start + i_m * TILE
    o_t = tl.arange(0, TILE)
    m_j = t + o_t < end
    # [HALF, BLOCK_N]
    HALF: tl.constexpr = BLOCK_P // 2
    o_half = i_m * HALF + tl.arange(0, HALF)
    o_n = tl.arange(0, BLOCK_N)
    o_rows = o_half[:, None] * N + o_n[None, :]
    m_rows = (o_half < P)[:, None] & (o_n < N)[None, :]

    b_dB = tl.zeros([TILE, BLOCK_N], tl.float32)
    first_head = i_g * HEADS_OF_GROUP
    for h in tl.range(first_head, first_head + HEADS_OF_GROUP, num_stages=STAGES):
        row = h * T
        o_S = (i_c * H + h) * (P * N)
        # [TILE, BLOCK_P], [BLOCK_P, BLOCK_N], [TILE]
        b_x = load_tile(x + t * stride_x + h * P, stride_x, o_t, m_j, P, BLOCK_P)
        b_dS = load_matrix(dstates + o_S, N, P, BLOCK_P, N, BLOCK_N)
        p_steps = steps + (row + tl.minimum(t + o_t, end - 1)) * 2
        a_last = load_sum(steps, row, end - 1)
        b_w = decay(a_last - tl.load(p_steps)) * tl.load(p_steps + 1).to(tl.float32)
        b_xw = (b_x.to(tl.float32) * b_w[:, None]).to(dtype)
        b_dB = tl.dot(b_xw, b_dS, acc=b_dB, input_precision=PRECISION)
        b_S = tl.load(states + o_S + o_rows, mask=m_rows, other=0.0).to(tl.float32)
        b_dS = tl.load(dstates + o_S + o_rows, mask=m_rows, other=0.0).to(tl.float32)
        b_through = tl.sum(b_S * b_dS, 1) * decay(a_last)
        tl.store(through + (i_c * H + h) * BLOCK_P + o_half, b_through)

    # [TILE, TILE], [TILE, BLOCK_N]: the tile itself, and the one after it
    o_tile = o_t[:, None] * TILE + o_t[None, :]
    b_dM = tl.load(dM + ((i_c * 3 + i_m) * n_g + i_g) * (TILE * TILE) + o_tile)
    b_C = load_tile(C + t * stride_C + i_g * N, stride_C, o_t, m_j, N, BLOCK_N)
    b_dB = tl.dot(tl.trans(b_dM), b_C, acc=b_dB, input_precision=PRECISION)
    if i_m == 0:
        m_i = t + TILE + o_t < end
        b_dM = tl.load(dM + ((i_c * 3 + 2) * n_g + i_g) * (TILE * TILE) + o_tile)
        p_C = C + (t + TILE) * stride_C + i_g * N
        b_C = load_tile(p_C, stride_C, o_t, m_i, N, BLOCK_N)
        b_dB = tl.dot(tl.trans(b_dM), b_C, acc=b_dB, input_precision=PRECISION)
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
    i_m,
    i_h,
    start,
    end,
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
):
    """dx of a tile of tokens j, from the tokens i of the same tile and of the one after.

    Everything lies transposed, `[j, i]`. With `v_j` the gradient of `dt_j x_j`,

        v_j = sum_{i >= j} (B_j . C_i) e^(a_i - a_j) dy_i + e^(a_last - a_j) dS B_j

    and dx_j = dt_j v_j + D dy_j. For the steps it leaves the weight of what j leaves in the state,
    over dt_j (`to_state`), and dy_j . x_j (`skip`).
    """
    i_g = i_h // HEADS_OF_GROUP
    dtype = x.dtype.element_ty
    t = start + i_m * TILE
    t_after = t + TILE
    o_t = tl.arange(0, TILE)
    m_j = t + o_t < end
    m_i = t_after + o_t < tl.where(i_m == 0, end, start)  # the tile after
    middle = tl.minimum(t_after, end) - 1

    # [TILE, BLOCK_N]
    b_B = load_tile(B + t * stride_B + i_g * N, stride_B, o_t, m_j, N, BLOCK_N)
    b_C = load_tile(C + t * stride_C + i_g * N, stride_C, o_t, m_j, N, BLOCK_N)
    # [TILE, TILE]
    b_BC = tl.dot(b_B, tl.trans(b_C), input_precision=PRECISION)
    b_BC = narrow(tl.where(o_t[:, None] <= o_t[None, :], b_BC, 0.0), dtype)
    b_C = load_tile(C + t_after * stride_C + i_g * N, stride_C, o_t, m_i, N, BLOCK_N)
    b_BC_after = narrow(tl.dot(b_B, tl.trans(b_C), input_precision=PRECISION), dtype)

    for h in tl.range(i_h, i_h + HEADS, num_stages=STAGES):
        row = h * T
        zero = tl.minimum(row, 0).to(tl.int32)
        # [TILE]
        b_a, b_dt, b_aa, _ = load_steps(steps, row, t, t_after, end - 1, TILE)
        a_m = load_sum(steps, row, middle)
        a_last = load_sum(steps, row, end - 1)

        # the state
        b_dS = load_matrix(dstates + (i_c * H + h) * (P * N), N, P, BLOCK_P, N, BLOCK_N)
        b_x = load_tile(x + t * stride_x + h * P, stride_x, o_t, m_j, P, BLOCK_P)
        b_dx = tl.dot(b_B, tl.trans(b_dS), input_precision=PRECISION)
        b_dx *= decay(a_last - b_a)[:, None]
        b_to = tl.sum(b_dx * b_x.to(tl.float32), 1)
        tl.store(to_state + row + t + o_t, b_to, mask=m_j)

        # the tile after
        b_W = widen(b_BC_after, zero) * tl.where(m_i, decay(b_aa - a_m), 0.0)[None, :]
        b_dy = load_tile(dy + t_after * stride_dy + h * P, stride_dy, o_t, m_i, P, BLOCK_P)
        b_dx *= b_dt[:, None]
        b_W *= (decay(a_m - b_a) * b_dt)[:, None]
        b_dx = tl.dot(b_W.to(dtype), b_dy, acc=b_dx, input_precision=PRECISION)

        # the tile itself, with D on the diagonal
        b_W = widen(b_BC, zero) * decay_from(-b_a, -b_a) * b_dt[:, None]
        if SKIP:
            b_W += tl.where(o_t[:, None] == o_t[None, :] + zero, tl.load(D + h).to(tl.float32), 0.0)
        b_dy = load_tile(dy + t * stride_dy + h * P, stride_dy, o_t, m_j, P, BLOCK_P)
        b_dx = tl.dot(b_W.to(dtype), b_dy, acc=b_dx, input_precision=PRECISION)
        b_skip = tl.sum(b_x.to(tl.float32) * b_dy.to(tl.float32), 1)
        tl.store(skip + row + t + o_t, b_skip, mask=m_j)
        store_tile(dx + t * stride_dx + h * P, stride_dx, o_t, m_j, b_dx, P, BLOCK_P)


@triton.jit
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
    """Chunk by chunk from the last: programs of dx, dB and dC."""
    n_g = H // HEADS_OF_GROUP
    n_h = H // HEADS
    n_of_chunk = 2 * (n_h + 2 * n_g)
    n_c = tl.num_programs(0) // n_of_chunk
    i_c = (n_c - 1 - tl.program_id(0) // n_of_chunk).to(tl.int64)
    i = tl.program_id(0) % n_of_chunk
    start = tl.load(chunk_start + i_c)
    end = tl.load(chunk_end + i_c)
    if i < 2 * n_h:
        i_h = (i % n_h).to(tl.int64) * HEADS
        _dx(
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
            i // n_h,
            i_h,
            start,
            end,
            T,
            H,
            stride_x,
            stride_B,
            stride_C,
            stride_dy,
            stride_dx,
            P,
            N,
            HEADS_OF_GROUP,
            HEADS,
            TILE,
            BLOCK_P,
            BLOCK_N,
            SKIP,
            STAGES_dx,
            PRECISION,
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
            end,
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
            end,
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
