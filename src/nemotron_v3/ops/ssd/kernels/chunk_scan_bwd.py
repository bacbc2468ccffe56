"""Gradients of x, B and C, chunk by chunk.

Letters as in chunk_scan_fwd.py; S the state before the chunk, dS the gradient of the state after
it. One launch has programs of three kinds: they share what they read, x, dy, S and dS, and
neighbours in the launch find it in the second-level cache. None leaves partial sums: a program of
dB or dC takes all heads of its group in order.

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
    load_cumsum,
    load_dA,
    load_group,
    load_head,
    load_state,
    split_dA,
    store_group,
    store_head,
)


@triton.jit
def _dC(
    B,
    C,
    dA_cumsum,
    prev_states,
    dy,
    dM,
    dC,
    ddA_from_states,
    i_c,
    i_m,
    i_g,
    start,
    length,
    T,
    H,
    STRIDES: tl.constexpr,
    SIZES: tl.constexpr,
    STAGES: tl.constexpr,
):
    """dC of a tile of tokens i, from the tokens j of its chunk and the state before it:

        dC_i = sum_{j <= i} dM_ij B_j + sum_h e^a_i S^T dy_i

    Also the weight of what y_i takes from S (`ddA_from_states`).
    """
    n_g = H // SIZES.HEADS_OF_GROUP
    dtype = dy.dtype.element_ty
    o = i_m * SIZES.TILE
    t = start + o
    o_t = tl.arange(0, SIZES.TILE)
    m_i = o + o_t < length

    # [TILE, BLOCK_N]
    b_C = load_group(C + t * STRIDES.C + i_g * SIZES.N, STRIDES.C, o_t, m_i, SIZES)
    b_dC = tl.zeros([tl.constexpr(SIZES.TILE), tl.constexpr(SIZES.BLOCK_N)], tl.float32)

    first_head = i_g * SIZES.HEADS_OF_GROUP
    for h in tl.range(first_head, first_head + SIZES.HEADS_OF_GROUP, num_stages=STAGES):
        # [TILE, BLOCK_P], [BLOCK_P, BLOCK_N], [TILE]
        b_dy = load_head(dy + t * STRIDES.dy + h * SIZES.P, STRIDES.dy, o_t, m_i, SIZES)
        b_S = load_state(prev_states + (i_c * H + h) * (SIZES.P * SIZES.N), SIZES, dtype)
        b_e = decay(tl.load(dA_cumsum + (h * T + start + tl.minimum(o + o_t, length - 1)) * 2))
        b_dye = b_dy.to(tl.float32) * b_e[:, None]
        b_from = tl.dot(b_C, tl.trans(b_S), input_precision=SIZES.PRECISION)
        tl.store(ddA_from_states + h * T + t + o_t, tl.sum(b_from * b_dye, 1), mask=m_i)
        b_dC = add_product(b_dC, b_dye.to(dtype), b_S, tl.constexpr(SIZES.PRECISION))

    # [TILE, TILE], [TILE, BLOCK_N]: the tile itself, and the one before it
    o_tile = o_t[:, None] * SIZES.TILE + o_t[None, :]
    b_dM = tl.load(dM + ((i_c * 3 + i_m) * n_g + i_g) * (SIZES.TILE * SIZES.TILE) + o_tile)
    b_B = load_group(B + t * STRIDES.B + i_g * SIZES.N, STRIDES.B, o_t, m_i, SIZES)
    b_dC = add_product(b_dC, b_dM, b_B, tl.constexpr(SIZES.PRECISION))
    if i_m == 1:
        m_j = o_t < length
        b_dM = tl.load(dM + ((i_c * 3 + 2) * n_g + i_g) * (SIZES.TILE * SIZES.TILE) + o_tile)
        b_B = load_group(B + start * STRIDES.B + i_g * SIZES.N, STRIDES.B, o_t, m_j, SIZES)
        b_dC = add_product(b_dC, b_dM, b_B, tl.constexpr(SIZES.PRECISION))
    store_group(dC + t * STRIDES.dC + i_g * SIZES.N, STRIDES.dC, o_t, m_i, b_dC, SIZES)


@triton.jit
def _dB(
    x,
    C,
    dA_cumsum,
    prev_states,
    dstates,
    dM,
    dB,
    ddA_through,
    i_c,
    i_m,
    i_g,
    start,
    length,
    T,
    H,
    STRIDES: tl.constexpr,
    SIZES: tl.constexpr,
    STAGES: tl.constexpr,
):
    """dB of a tile of tokens j, from the tokens i of its chunk and the state behind it:

        dB_j = sum_{i >= j} dM_ij C_i + sum_h dt_j e^(a_last - a_j) dS^T x_j

    Also, row by row of the state, the weight of what goes from before the chunk to behind it
    (`ddA_through`); each of the two tiles does half of the rows.
    """
    n_g = H // SIZES.HEADS_OF_GROUP
    dtype = x.dtype.element_ty
    o = i_m * SIZES.TILE
    t = start + o
    o_t = tl.arange(0, SIZES.TILE)
    m_j = o + o_t < length
    # [HALF, BLOCK_N]
    HALF: tl.constexpr = SIZES.BLOCK_P // 2
    o_half = i_m * HALF + tl.arange(0, HALF)
    o_n = tl.arange(0, SIZES.BLOCK_N)
    o_rows = o_half[:, None] * SIZES.N + o_n[None, :]
    m_rows = (o_half < SIZES.P)[:, None] & (o_n < SIZES.N)[None, :]

    b_dB = tl.zeros([tl.constexpr(SIZES.TILE), tl.constexpr(SIZES.BLOCK_N)], tl.float32)
    first_head = i_g * SIZES.HEADS_OF_GROUP
    for h in tl.range(first_head, first_head + SIZES.HEADS_OF_GROUP, num_stages=STAGES):
        row = h * T + start
        o_S = (i_c * H + h) * (SIZES.P * SIZES.N)
        # [TILE, BLOCK_P], [BLOCK_P, BLOCK_N], [TILE]
        b_x = load_head(x + t * STRIDES.x + h * SIZES.P, STRIDES.x, o_t, m_j, SIZES)
        b_dS = load_state(dstates + o_S, SIZES, dtype)
        p_dA = dA_cumsum + (row + tl.minimum(o + o_t, length - 1)) * 2
        a_last = load_cumsum(dA_cumsum, row, length - 1)
        b_w = decay(a_last - tl.load(p_dA)) * tl.load(p_dA + 1).to(tl.float32)
        b_xw = (b_x.to(tl.float32) * b_w[:, None]).to(dtype)
        b_dB = add_product(b_dB, b_xw, b_dS, tl.constexpr(SIZES.PRECISION))
        b_S = tl.load(prev_states + o_S + o_rows, mask=m_rows, other=0.0).to(tl.float32)
        b_dS = tl.load(dstates + o_S + o_rows, mask=m_rows, other=0.0).to(tl.float32)
        b_through = tl.sum(b_S * b_dS, 1) * decay(a_last)
        tl.store(ddA_through + (i_c * H + h) * SIZES.BLOCK_P + o_half, b_through)

    # [TILE, TILE], [TILE, BLOCK_N]: the tile itself, and the one after it
    o_tile = o_t[:, None] * SIZES.TILE + o_t[None, :]
    b_dM = tl.load(dM + ((i_c * 3 + i_m) * n_g + i_g) * (SIZES.TILE * SIZES.TILE) + o_tile)
    b_C = load_group(C + t * STRIDES.C + i_g * SIZES.N, STRIDES.C, o_t, m_j, SIZES)
    b_dB = add_product(b_dB, tl.trans(b_dM), b_C, tl.constexpr(SIZES.PRECISION))
    if i_m == 0:
        m_i = SIZES.TILE + o_t < length
        b_dM = tl.load(dM + ((i_c * 3 + 2) * n_g + i_g) * (SIZES.TILE * SIZES.TILE) + o_tile)
        p_C = C + (t + SIZES.TILE) * STRIDES.C + i_g * SIZES.N
        b_C = load_group(p_C, STRIDES.C, o_t, m_i, SIZES)
        b_dB = add_product(b_dB, tl.trans(b_dM), b_C, tl.constexpr(SIZES.PRECISION))
    store_group(dB + t * STRIDES.dB + i_g * SIZES.N, STRIDES.dB, o_t, m_j, b_dB, SIZES)


@triton.jit
def _dx(
    x,
    B,
    C,
    D,
    dA_cumsum,
    dstates,
    dy,
    dx,
    ddA_to_states,
    x_dot_dy,
    i_c,
    i_h,
    start,
    length,
    T,
    H,
    STRIDES: tl.constexpr,
    SIZES: tl.constexpr,
    STAGES: tl.constexpr,
    FIRST: tl.constexpr,
):
    """dx of a tile of tokens j, from the tokens i of the same tile and of the one after.

    Everything lies transposed, `[j, i]`. With `v_j` the gradient of `dt_j x_j` and `m` the tile's
    last token, so that every factor is at most 1,

        v_j = sum_{i >= j in the tile} (B_j . C_i) e^(a_i - a_j) dy_i
            + e^(a_m - a_j) ( sum_{i in the tile after} (B_j . C_i) e^(a_i - a_m) dy_i
                            + e^(a_last - a_m) dS B_j )

    and dx_j = dt_j v_j + D dy_j. For the gradients of dt and A it leaves the weight of what j adds
    to the state, over dt_j (`ddA_to_states`), and dy_j . x_j (`x_dot_dy`). FIRST: of the two tiles;
    the second has none after it.
    """
    i_g = i_h // SIZES.HEADS_OF_GROUP
    dtype = x.dtype.element_ty
    o: tl.constexpr = 0 if FIRST else SIZES.TILE
    o_t = tl.arange(0, SIZES.TILE)
    m_j = o + o_t < length
    m_i = SIZES.TILE + o_t < length  # the tile after
    middle = tl.minimum(SIZES.TILE, length) - 1
    x += (start + o) * STRIDES.x
    dy += (start + o) * STRIDES.dy
    dx += (start + o) * STRIDES.dx
    B += (start + o) * STRIDES.B + i_g * SIZES.N
    C += (start + o) * STRIDES.C + i_g * SIZES.N

    # [TILE, BLOCK_N]
    b_B = load_group(B, STRIDES.B, o_t, m_j, SIZES)
    b_C = load_group(C, STRIDES.C, o_t, m_j, SIZES)
    # [TILE, TILE]
    b_BC = tl.dot(b_B, tl.trans(b_C), input_precision=SIZES.PRECISION)
    b_BC = tl.where(o_t[:, None] <= o_t[None, :], b_BC, 0.0)
    if FIRST:
        b_C = load_group(C + SIZES.TILE * STRIDES.C, STRIDES.C, o_t, m_i, SIZES)
        b_BC_after = tl.dot(b_B, tl.trans(b_C), input_precision=SIZES.PRECISION)

    # What the weights of pairs need is loaded a head ahead, as in chunk_scan_fwd.py.
    row = i_h * T + start
    n_dA = load_dA(dA_cumsum + row * 2, o, o + SIZES.TILE, length, SIZES.TILE)
    n_last = load_cumsum(dA_cumsum, row, length - 1)
    n_m = load_cumsum(dA_cumsum, row, middle) if FIRST else n_last
    for h in tl.range(i_h, i_h + SIZES.HEADS, num_stages=STAGES):
        row = h * T + start
        # [TILE]
        b_a, b_dt, b_aa, _ = split_dA(n_dA)
        a_m = n_m
        a_last = n_last
        n_row = tl.minimum(h + 1, i_h + SIZES.HEADS - 1) * T + start
        n_dA = load_dA(dA_cumsum + n_row * 2, o, o + SIZES.TILE, length, SIZES.TILE)
        n_last = load_cumsum(dA_cumsum, n_row, length - 1)
        n_m = load_cumsum(dA_cumsum, n_row, middle) if FIRST else n_last

        # [TILE, TILE]
        b_W = (b_BC * decay_down(b_a[None, :] - b_a[:, None])).to(dtype)

        # the state
        b_dS = load_state(dstates + (i_c * H + h) * (SIZES.P * SIZES.N), SIZES, dtype)
        b_x = load_head(x + h * SIZES.P, STRIDES.x, o_t, m_j, SIZES).to(tl.float32)
        b_dx = tl.dot(b_B, tl.trans(b_dS), input_precision=SIZES.PRECISION)
        b_to = tl.sum(b_dx * b_x, 1) * decay(a_last - b_a)
        tl.store(ddA_to_states + row + o + o_t, b_to, mask=m_j)

        if FIRST:  # the tile after
            b_W_after = (b_BC_after * decay(b_aa - a_m)[None, :]).to(dtype)
            p_dy = dy + SIZES.TILE * STRIDES.dy + h * SIZES.P
            b_dy = load_head(p_dy, STRIDES.dy, o_t, m_i, SIZES)
            b_dx *= decay(a_last - a_m)
            b_dx = tl.dot(b_W_after, b_dy, acc=b_dx, input_precision=SIZES.PRECISION)
        b_dx *= decay(a_m - b_a)[:, None]

        # the tile itself
        b_dy = load_head(dy + h * SIZES.P, STRIDES.dy, o_t, m_j, SIZES)
        b_dx = tl.dot(b_W, b_dy, acc=b_dx, input_precision=SIZES.PRECISION)
        b_dx *= b_dt[:, None]
        b_dy = b_dy.to(tl.float32)
        tl.store(x_dot_dy + row + o + o_t, tl.sum(b_x * b_dy, 1), mask=m_j)
        if D is not None:
            b_dx += tl.load(D + h).to(tl.float32) * b_dy
        store_head(dx + h * SIZES.P, STRIDES.dx, o_t, m_j, b_dx, SIZES)


@kernel
def chunk_scan_bwd_kernel(
    x,
    B,
    C,
    D,
    dA_cumsum,
    prev_states,
    dstates,
    dy,
    dM,
    dx,
    dB,
    dC,
    ddA_from_states,
    ddA_to_states,
    x_dot_dy,
    ddA_through,
    chunk_start,
    chunk_end,
    T,
    H,
    STRIDES: tl.constexpr,
    SIZES: tl.constexpr,
    STAGES: tl.constexpr,
):
    """Chunk by chunk from the first, where chunk_bwd_dcb.py ends: programs of dx, dB and dC."""
    n_g = H // SIZES.HEADS_OF_GROUP
    n_h = H // SIZES.HEADS
    n_of_chunk = 2 * (n_h + 2 * n_g)
    i_c = (tl.program_id(0) // n_of_chunk).to(tl.int64)
    i = tl.program_id(0) % n_of_chunk
    start = tl.load(chunk_start + i_c)
    length = (tl.load(chunk_end + i_c) - start).to(tl.int32)
    chunk = (start, length, T, H)
    if i < 2 * n_h:
        i_h = (i % n_h).to(tl.int64) * SIZES.HEADS
        of_dx = (x, B, C, D, dA_cumsum, dstates, dy, dx, ddA_to_states, x_dot_dy)
        if i < n_h:
            _dx(*of_dx, i_c, i_h, *chunk, STRIDES, SIZES, STAGES.dx, True)
        elif length > SIZES.TILE:
            _dx(*of_dx, i_c, i_h, *chunk, STRIDES, SIZES, STAGES.dx, False)
    elif i < 2 * (n_h + n_g):
        i -= 2 * n_h
        of_dB = (x, C, dA_cumsum, prev_states, dstates, dM, dB, ddA_through)
        _dB(*of_dB, i_c, i // n_g, (i % n_g).to(tl.int64), *chunk, STRIDES, SIZES, STAGES.dB)
    else:
        i -= 2 * (n_h + n_g)
        of_dC = (B, C, dA_cumsum, prev_states, dy, dM, dC, ddA_from_states)
        _dC(*of_dC, i_c, i // n_g, (i % n_g).to(tl.int64), *chunk, STRIDES, SIZES, STAGES.dC)
