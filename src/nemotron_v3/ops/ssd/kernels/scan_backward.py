"""Gradients of x, B, C, and what the steps' backward needs, chunk by chunk.

Letters as in scan.py; S the state before the chunk, dS the gradient of the state after it. Three
kernels, of dC, dB and dx: what one of them holds in registers leaves room for enough warps on a
multiprocessor to hide their latency, which is worth more than reading x and dy once. None leaves
partial sums: a program of dB or dC takes all heads of its group in order.
"""

import triton
import triton.language as tl

from nemotron_v3.ops.ssd.kernels.tiles import (
    decay,
    decay_after,
    decay_before,
    load_matrix,
    load_steps,
    load_sum,
    load_tile,
    store_tile,
)


@triton.jit
def dC_kernel(
    x,
    B,
    C,
    steps,
    states,
    dy,
    dC,
    from_state,
    chunk_start,
    chunk_end,
    T,
    H,
    stride_x,
    stride_B,
    stride_C,
    stride_dy,
    stride_dC,
    P: tl.constexpr,
    N: tl.constexpr,
    HEADS_OF_GROUP: tl.constexpr,
    TILE: tl.constexpr,
    BLOCK_P: tl.constexpr,
    BLOCK_N: tl.constexpr,
    STAGES: tl.constexpr,
    PRECISION: tl.constexpr,
):
    """dC of a tile of tokens i, from the tokens j of the same tile and of the one before:

        dC_i = sum_h ( e^a_i S^T dy_i + sum_{j <= i} (dy_i . x_j) e^(a_i - a_j) dt_j B_j )

    Also the weight of what y_i takes from S (`from_state`).
    """
    n_g = H // HEADS_OF_GROUP
    i_g = (tl.program_id(0) % n_g).to(tl.int64)
    i_m = (tl.program_id(0) // n_g) % 2
    i_c = (tl.program_id(0) // n_g // 2).to(tl.int64)
    dtype = x.dtype.element_ty
    start = tl.load(chunk_start + i_c)
    end = tl.load(chunk_end + i_c)
    t = start + i_m * TILE
    o_t = tl.arange(0, TILE)
    m_i = t + o_t < end
    m_j = start + o_t < tl.minimum(t, end)  # the tile before
    before = tl.minimum(tl.maximum(t - 1, start), end - 1)

    # [TILE, BLOCK_N]
    b_C = load_tile(C + t * stride_C + i_g * N, stride_C, o_t, m_i, N, BLOCK_N)
    b_B = load_tile(B + t * stride_B + i_g * N, stride_B, o_t, m_i, N, BLOCK_N)
    b_Bb = load_tile(B + start * stride_B + i_g * N, stride_B, o_t, m_j, N, BLOCK_N)
    b_dC = tl.zeros([TILE, BLOCK_N], tl.float32)

    first_head = i_g * HEADS_OF_GROUP
    for h in tl.range(first_head, first_head + HEADS_OF_GROUP, num_stages=STAGES):
        row = h * T
        zero = tl.minimum(row, 0).to(tl.int32)
        o_S = (i_c * H + h) * (P * N)
        # [TILE, BLOCK_P], [BLOCK_P, BLOCK_N]
        b_dy = load_tile(dy + t * stride_dy + h * P, stride_dy, o_t, m_i, P, BLOCK_P)
        b_x = load_tile(x + start * stride_x + h * P, stride_x, o_t, m_j, P, BLOCK_P)
        # [TILE]
        b_a, b_dt, b_ab, b_dtb = load_steps(steps, row, t, start, end - 1, TILE)
        a_m = tl.where(i_m > 0, load_sum(steps, row, before), 0.0)

        b_M = tl.dot(b_dy, tl.trans(b_x), input_precision=PRECISION)
        b_c = tl.where(m_j, decay(a_m - b_ab) * b_dtb, 0.0)
        b_r = tl.where(m_i, decay(b_a - a_m), 0.0)
        b_M *= b_r[:, None] * b_c[None, :]
        b_dC = tl.dot(b_M.to(dtype), b_Bb, acc=b_dC, input_precision=PRECISION)
        b_x = load_tile(x + t * stride_x + h * P, stride_x, o_t, m_i, P, BLOCK_P)
        b_M = tl.dot(b_dy, tl.trans(b_x), input_precision=PRECISION)
        b_M *= decay_before(b_a, TILE, zero) * b_dt[None, :]
        b_dC = tl.dot(b_M.to(dtype), b_B, acc=b_dC, input_precision=PRECISION)

        # Read anew: kept from above, it would cost the registers of another sum.
        b_dy = load_tile(dy + t * stride_dy + h * P, stride_dy, o_t, m_i, P, BLOCK_P)
        b_S = load_matrix(states + o_S, N, P, BLOCK_P, N, BLOCK_N)
        b_from = tl.dot(b_C, tl.trans(b_S), input_precision=PRECISION) * b_dy.to(tl.float32)
        tl.store(from_state + row + t + o_t, tl.sum(b_from, 1) * decay(b_a), mask=m_i)
        b_dyw = (b_dy.to(tl.float32) * decay(b_a)[:, None]).to(dtype)
        b_dC = tl.dot(b_dyw, b_S, acc=b_dC, input_precision=PRECISION)

    store_tile(dC + t * stride_dC + i_g * N, stride_dC, o_t, m_i, b_dC, N, BLOCK_N)


@triton.jit
def dB_kernel(
    x,
    C,
    steps,
    dstates,
    dy,
    dB,
    chunk_start,
    chunk_end,
    T,
    H,
    stride_x,
    stride_C,
    stride_dy,
    stride_dB,
    P: tl.constexpr,
    N: tl.constexpr,
    HEADS_OF_GROUP: tl.constexpr,
    TILE: tl.constexpr,
    BLOCK_P: tl.constexpr,
    BLOCK_N: tl.constexpr,
    STAGES: tl.constexpr,
    PRECISION: tl.constexpr,
):
    """dB of a tile of tokens j, from the tokens i of the same tile and of the one after:

    dB_j = sum_h dt_j ( sum_{i >= j} (x_j . dy_i) e^(a_i - a_j) C_i + e^(a_last - a_j) dS^T x_j )
    """
    n_g = H // HEADS_OF_GROUP
    i_g = (tl.program_id(0) % n_g).to(tl.int64)
    i_m = (tl.program_id(0) // n_g) % 2
    i_c = (tl.program_id(0) // n_g // 2).to(tl.int64)
    dtype = x.dtype.element_ty
    start = tl.load(chunk_start + i_c)
    end = tl.load(chunk_end + i_c)
    t = start + i_m * TILE
    if t < end:
        t_after = t + TILE
        o_t = tl.arange(0, TILE)
        m_j = t + o_t < end
        m_i = t_after + o_t < tl.where(i_m == 0, end, start)  # the tile after
        middle = tl.minimum(t_after, end) - 1

        # [TILE, BLOCK_N]
        b_C = load_tile(C + t * stride_C + i_g * N, stride_C, o_t, m_j, N, BLOCK_N)
        b_Ca = load_tile(C + t_after * stride_C + i_g * N, stride_C, o_t, m_i, N, BLOCK_N)
        b_dB = tl.zeros([TILE, BLOCK_N], tl.float32)

        first_head = i_g * HEADS_OF_GROUP
        for h in tl.range(first_head, first_head + HEADS_OF_GROUP, num_stages=STAGES):
            row = h * T
            zero = tl.minimum(row, 0).to(tl.int32)
            # [TILE, BLOCK_P], [BLOCK_P, BLOCK_N]
            b_x = load_tile(x + t * stride_x + h * P, stride_x, o_t, m_j, P, BLOCK_P)
            b_dya = load_tile(dy + t_after * stride_dy + h * P, stride_dy, o_t, m_i, P, BLOCK_P)
            # [TILE]
            b_a, b_dt, b_aa, _ = load_steps(steps, row, t, t_after, end - 1, TILE)
            a_m = load_sum(steps, row, middle)
            a_last = load_sum(steps, row, end - 1)
            b_r = tl.where(m_i, decay(b_aa - a_m), 0.0)

            b_M = tl.dot(b_x, tl.trans(b_dya), input_precision=PRECISION)
            b_M *= b_r[None, :] * (decay(a_m - b_a) * b_dt)[:, None]
            b_dB = tl.dot(b_M.to(dtype), b_Ca, acc=b_dB, input_precision=PRECISION)
            b_dy = load_tile(dy + t * stride_dy + h * P, stride_dy, o_t, m_j, P, BLOCK_P)
            b_M = tl.dot(b_x, tl.trans(b_dy), input_precision=PRECISION)
            b_M *= decay_after(b_a, TILE, zero) * b_dt[:, None]
            b_dB = tl.dot(b_M.to(dtype), b_C, acc=b_dB, input_precision=PRECISION)
            p_dS = dstates + (i_c * H + h) * (P * N)
            b_dS = load_matrix(p_dS, N, P, BLOCK_P, N, BLOCK_N)
            b_xe = (b_x.to(tl.float32) * (decay(a_last - b_a) * b_dt)[:, None]).to(dtype)
            b_dB = tl.dot(b_xe, b_dS, acc=b_dB, input_precision=PRECISION)

        store_tile(dB + t * stride_dB + i_g * N, stride_dB, o_t, m_j, b_dB, N, BLOCK_N)


@triton.jit
def dx_kernel(
    x,
    B,
    C,
    D,
    steps,
    dstates,
    dy,
    dx,
    direct,
    diagonal,
    across,
    to_state,
    dskip,
    chunk_start,
    chunk_end,
    T,
    H,
    stride_x,
    stride_B,
    stride_C,
    stride_dy,
    stride_dx,
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

    For the steps it leaves `direct` = x . v, and the weights of pairs: inside the tile (`diagonal`,
    by row less by column), between the tiles (`across`, by the token that lies in the tile), and of
    what j leaves in the state (`to_state`).
    """
    n_h = H // HEADS
    i_h = (tl.program_id(0) % n_h).to(tl.int64) * HEADS
    i_g = i_h // HEADS_OF_GROUP
    i_m = (tl.program_id(0) // n_h) % 2
    i_c = (tl.program_id(0) // n_h // 2).to(tl.int64)
    dtype = x.dtype.element_ty
    start = tl.load(chunk_start + i_c)
    end = tl.load(chunk_end + i_c)
    t = start + i_m * TILE
    t_after = t + TILE
    o_t = tl.arange(0, TILE)
    m_j = t + o_t < end
    m_i = t_after + o_t < tl.where(i_m == 0, end, start)  # the tile after
    middle = tl.minimum(t_after, end) - 1

    # [TILE, BLOCK_N]
    b_B = load_tile(B + t * stride_B + i_g * N, stride_B, o_t, m_j, N, BLOCK_N)
    b_C = load_tile(C + t * stride_C + i_g * N, stride_C, o_t, m_j, N, BLOCK_N)
    b_Ca = load_tile(C + t_after * stride_C + i_g * N, stride_C, o_t, m_i, N, BLOCK_N)

    for h in tl.range(i_h, i_h + HEADS, num_stages=STAGES):
        row = h * T
        zero = tl.minimum(row, 0).to(tl.int32)
        # [TILE, BLOCK_P], [BLOCK_P, BLOCK_N]
        b_x = load_tile(x + t * stride_x + h * P, stride_x, o_t, m_j, P, BLOCK_P)
        b_dy = load_tile(dy + t * stride_dy + h * P, stride_dy, o_t, m_j, P, BLOCK_P)
        b_dya = load_tile(dy + t_after * stride_dy + h * P, stride_dy, o_t, m_i, P, BLOCK_P)
        b_dS = load_matrix(dstates + (i_c * H + h) * (P * N), N, P, BLOCK_P, N, BLOCK_N)
        # [TILE]
        b_a, b_dt, b_aa, _ = load_steps(steps, row, t, t_after, end - 1, TILE)
        a_m = load_sum(steps, row, middle)
        a_last = load_sum(steps, row, end - 1)
        b_r = tl.where(m_i, decay(b_aa - a_m), 0.0)
        b_c = tl.where(m_j, decay(a_m - b_a), 0.0)

        # the tile after
        b_W = tl.dot(b_B, tl.trans(b_Ca), input_precision=PRECISION)
        b_W *= b_r[None, :] * b_c[:, None]
        b_G = tl.dot(b_x, tl.trans(b_dya), input_precision=PRECISION)
        b_G = (b_G * b_W * b_dt[:, None]).to(diagonal.dtype.element_ty)
        tl.store(across + row + t_after + o_t, tl.sum(b_G, 0), mask=m_i)
        tl.store(across + row + t + o_t, tl.sum(b_G, 1), mask=(o_t < TILE * (1 - i_m)) & m_j)
        b_v = tl.dot(b_W.to(dtype), b_dya, input_precision=PRECISION)

        # the tile itself
        b_W = tl.dot(b_B, tl.trans(b_C), input_precision=PRECISION)
        b_W *= decay_after(b_a, TILE, zero)
        b_G = tl.dot(b_x, tl.trans(b_dy), input_precision=PRECISION)
        b_G = (b_G * b_W * b_dt[:, None]).to(diagonal.dtype.element_ty)
        # The diagonal of G stands in both sums and cancels.
        tl.store(diagonal + row + t + o_t, tl.sum(b_G, 0) - tl.sum(b_G, 1), mask=m_j)
        b_v = tl.dot(b_W.to(dtype), b_dy, acc=b_v, input_precision=PRECISION)

        # The state. x and dy are read anew: kept from above, each would cost the registers of
        # another sum.
        b_W = tl.dot(b_B, tl.trans(b_dS), input_precision=PRECISION)
        b_W *= decay(a_last - b_a)[:, None]
        b_v += b_W
        b_x = load_tile(x + t * stride_x + h * P, stride_x, o_t, m_j, P, BLOCK_P)
        b_W *= b_x.to(tl.float32)
        tl.store(to_state + row + t + o_t, tl.sum(b_W, 1) * b_dt, mask=m_j)
        tl.store(direct + row + t + o_t, tl.sum(b_x.to(tl.float32) * b_v, 1), mask=m_j)
        b_v *= b_dt[:, None]
        if SKIP:
            b_dy = load_tile(dy + t * stride_dy + h * P, stride_dy, o_t, m_j, P, BLOCK_P)
            b_v += b_dy.to(tl.float32) * tl.load(D + h).to(tl.float32)
            b_dD = tl.sum(tl.sum(b_x.to(tl.float32) * b_dy.to(tl.float32), 1), 0)
            tl.store(dskip + (i_c * 2 + i_m) * H + h, b_dD)
        store_tile(dx + t * stride_dx + h * P, stride_dx, o_t, m_j, b_v, P, BLOCK_P)
