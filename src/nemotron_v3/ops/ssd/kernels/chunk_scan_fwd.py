"""The outputs of each chunk, from its tokens and the state before it.

Letters: H heads, P head width, N state. A chunk is two tiles of TILE tokens; a program computes one
tile of some heads of one group. With `m` the token before the tile (nothing where the tile is the
chunk's first) and `r_i = exp2(a_i - a_m)`,

    y_i = D x_i + sum_{j <= i in the tile} (C_i . B_j) exp2(a_i - a_j) dt_j x_j
        + r_i ( sum_{j in the tile before} (C_i . B_j) exp2(a_m - a_j) dt_j x_j + e^a_m S C_i )

so that only the tile's own block needs an exponential for each pair. Every factor is at most 1.
"""

from typing import Any, NamedTuple

import triton
import triton.language as tl

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
    store_head,
)


class Tensors(NamedTuple):
    x: Any
    B: Any
    C: Any
    D: Any
    dA_cumsum: Any
    prev_states: Any
    y: Any


@kernel
def chunk_scan_fwd_kernel(
    x,
    B,
    C,
    D,
    dA_cumsum,
    prev_states,
    y,
    chunk_start,
    chunk_end,
    T,
    H,
    STRIDES: tl.constexpr,
    SIZES: tl.constexpr,
    STAGES: tl.constexpr,
):
    """Chunks from the last, where the passing of the states has ended.

    The second-level cache still holds what it read and stored there.
    """
    n_programs = H // SIZES.HEADS
    n_c = tl.num_programs(0) // n_programs // 2
    i_h = (tl.program_id(0) % n_programs).to(tl.int64) * SIZES.HEADS
    i_m = (tl.program_id(0) // n_programs) % 2
    i_c = (n_c - 1 - tl.program_id(0) // n_programs // 2).to(tl.int64)
    start = tl.load(chunk_start + i_c)
    length = (tl.load(chunk_end + i_c) - start).to(tl.int32)
    tensors = Tensors(x, B, C, D, dA_cumsum, prev_states, y)
    if i_m == 0:
        _outputs(tensors, i_c, i_h, start, length, T, H, STRIDES, SIZES, STAGES, True)
    elif length > SIZES.TILE:
        _outputs(tensors, i_c, i_h, start, length, T, H, STRIDES, SIZES, STAGES, False)


@triton.jit
def _outputs(
    tensors,
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
    """FIRST: of the two tiles."""
    i_g = i_h // SIZES.HEADS_OF_GROUP
    dtype = tensors.x.dtype.element_ty
    dA_cumsum, D = tensors.dA_cumsum, tensors.D
    o: tl.constexpr = 0 if FIRST else SIZES.TILE
    o_t = tl.arange(0, SIZES.TILE)
    m_i = o + o_t < length
    x = tensors.x + start * STRIDES.x
    y = tensors.y + (start + o) * STRIDES.y
    B = tensors.B + (start * STRIDES.B + i_g * SIZES.N)
    C = tensors.C + ((start + o) * STRIDES.C + i_g * SIZES.N)

    # [TILE, BLOCK_N]
    b_C = load_group(C, STRIDES.C, o_t, m_i, SIZES)
    b_B = load_group(B + o * STRIDES.B, STRIDES.B, o_t, m_i, SIZES)
    # [TILE, TILE]
    b_CB = tl.dot(b_C, tl.trans(b_B), input_precision=SIZES.PRECISION)
    b_CB = tl.where(o_t[:, None] >= o_t[None, :], b_CB, 0.0)
    if not FIRST:
        b_B = load_group(B, STRIDES.B, o_t, o_t < SIZES.TILE, SIZES)
        b_CB_before = tl.dot(b_C, tl.trans(b_B), input_precision=SIZES.PRECISION)

    # What the weights of pairs need is loaded a head ahead, into registers: they are computed
    # while the tiles of the head come.
    row = i_h * T + start
    n_dA = load_dA(dA_cumsum + row * 2, o, 0, length, SIZES.TILE)
    n_m = 0.0
    if not FIRST:
        n_m = load_cumsum(dA_cumsum, row, o - 1)
    n_D = 0.0
    if D is not None:
        n_D = tl.load(D + i_h).to(tl.float32)
    for h in tl.range(i_h, i_h + SIZES.HEADS, num_stages=STAGES):
        # [TILE]
        b_a, b_dt, b_ab, b_dtb = split_dA(n_dA)
        a_m = n_m
        b_D = n_D
        n_h = tl.minimum(h + 1, i_h + SIZES.HEADS - 1)
        row = n_h * T + start
        n_dA = load_dA(dA_cumsum + row * 2, o, 0, length, SIZES.TILE)
        if not FIRST:
            n_m = load_cumsum(dA_cumsum, row, o - 1)
        if D is not None:
            n_D = tl.load(D + n_h).to(tl.float32)

        # [TILE, TILE]
        b_W = b_CB * decay_down(b_a[:, None] - b_a[None, :]) * b_dt[None, :]
        if D is not None:
            b_W += tl.where(o_t[:, None] == o_t[None, :], b_D, 0.0)
        b_W = b_W.to(dtype)

        # [TILE, BLOCK_P], [BLOCK_P, BLOCK_N]
        p_S = tensors.prev_states + (i_c * H + h) * (SIZES.P * SIZES.N)
        b_S = load_state(p_S, SIZES, dtype)
        b_x = load_head(x + o * STRIDES.x + h * SIZES.P, STRIDES.x, o_t, m_i, SIZES)
        b_y = tl.dot(b_C, tl.trans(b_S), input_precision=SIZES.PRECISION)
        if FIRST:
            b_y *= decay(b_a)[:, None]
        else:
            b_c = decay(a_m - b_ab) * b_dtb
            b_W_before = (b_CB_before * b_c[None, :]).to(dtype)
            b_xb = load_head(x + h * SIZES.P, STRIDES.x, o_t, o_t < SIZES.TILE, SIZES)
            b_y = tl.dot(b_W_before, b_xb, acc=b_y * decay(a_m), input_precision=SIZES.PRECISION)
            b_y *= decay(b_a - a_m)[:, None]
        b_y = tl.dot(b_W, b_x, acc=b_y, input_precision=SIZES.PRECISION)
        store_head(y + h * SIZES.P, STRIDES.y, o_t, m_i, b_y, SIZES)
