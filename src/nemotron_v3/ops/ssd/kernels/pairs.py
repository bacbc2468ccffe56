"""Pairs of a chunk's tokens: what dB and dC take from them, summed over heads, and their weights.

Letters as in scan.py. dB and dC then multiply each block of pairs once, and not for each head.
"""

import triton
import triton.language as tl

from nemotron_v3.ops.common.jit import kernel
from nemotron_v3.ops.ssd.kernels.loads import (
    decay_down,
    load_steps,
    load_tile,
    split_steps,
)
from nemotron_v3.ops.ssd.kernels.states import sweep


@kernel
def pairs_kernel(
    x,
    B,
    C,
    steps,
    dy,
    dfinal,
    dstates,
    dinitial,
    dM,
    rows,
    columns,
    across,
    own,
    chunk_start,
    chunk_end,
    cu_seqlens,
    document_chunks,
    T,
    H,
    sweeps,
    stride_x: tl.constexpr,
    stride_B: tl.constexpr,
    stride_C: tl.constexpr,
    stride_dy: tl.constexpr,
    P: tl.constexpr,
    N: tl.constexpr,
    HEADS_OF_GROUP: tl.constexpr,
    TILE: tl.constexpr,
    BLOCK_P: tl.constexpr,
    BLOCK_N: tl.constexpr,
    SLICE: tl.constexpr,
    STAGES_sweep: tl.constexpr,
    STAGES: tl.constexpr,
    PRECISION: tl.constexpr,
):
    """The first `sweeps` programs leave the gradients of the states, which nothing else here needs.

    The pairs come in the order of those sweeps, with which they share the loads of dy.
    """
    i = tl.program_id(0)
    if i < sweeps:
        sweep(
            i,
            dy,
            C,
            steps,
            dfinal,
            dstates,
            dinitial,
            cu_seqlens,
            document_chunks,
            T,
            H,
            stride_dy,
            stride_C,
            P,
            N,
            HEADS_OF_GROUP,
            2 * TILE,
            BLOCK_P,
            SLICE,
            True,
            STAGES_sweep,
            PRECISION,
        )
    else:
        i -= sweeps
        n_g = H // HEADS_OF_GROUP
        n_c = (tl.num_programs(0) - sweeps) // (3 * n_g)
        i_c = (n_c - 1 - i // n_g // 3).to(tl.int64)
        _pairs(
            x,
            B,
            C,
            steps,
            dy,
            dM,
            rows,
            columns,
            across,
            own,
            i_c,
            (i // n_g) % 3,
            (i % n_g).to(tl.int64),
            chunk_start,
            chunk_end,
            T,
            H,
            stride_x,
            stride_B,
            stride_C,
            stride_dy,
            P,
            N,
            HEADS_OF_GROUP,
            TILE,
            BLOCK_P,
            BLOCK_N,
            STAGES,
            PRECISION,
        )


@triton.jit
def _pairs(
    x,
    B,
    C,
    steps,
    dy,
    dM,
    rows,
    columns,
    across,
    own,
    i_c,
    i_b,
    i_g,
    chunk_start,
    chunk_end,
    T,
    H,
    stride_x: tl.constexpr,
    stride_B: tl.constexpr,
    stride_C: tl.constexpr,
    stride_dy: tl.constexpr,
    P: tl.constexpr,
    N: tl.constexpr,
    HEADS_OF_GROUP: tl.constexpr,
    TILE: tl.constexpr,
    BLOCK_P: tl.constexpr,
    BLOCK_N: tl.constexpr,
    STAGES: tl.constexpr,
    PRECISION: tl.constexpr,
):
    """Pairs of tokens j <= i of one block of a chunk: its first tile, its second, or across them.

        dM_ij = sum_h (dy_i . x_j) e^(a_i - a_j) dt_j

    over the heads of a group, for dB and dC. For the steps, of each head, the weights of pairs
    j < i, `G_ij = (dy_i . x_j) (C_i . B_j) e^(a_i - a_j)`: in a tile, times dt_j and summed over j
    (`rows`, by i), and summed over i (`columns`, by j); between the tiles, the same by the token
    that lies in the tile (`across`). And of each group `own`, C_i . B_i. Pairs of a token with
    itself are left out: what the steps' backward subtracts would cancel them, not quite.
    """
    n_g = H // HEADS_OF_GROUP
    start = tl.load(chunk_start + i_c)
    length = (tl.load(chunk_end + i_c) - start).to(tl.int32)
    o_i = tl.where(i_b > 0, TILE, 0)
    o_j = tl.where(i_b == 1, TILE, 0)
    o_t = tl.arange(0, TILE)
    m_i = o_i + o_t < length
    m_j = o_j + o_t < length
    x += (start + o_j) * stride_x
    B += (start + o_j) * stride_B + i_g * N
    C += (start + o_i) * stride_C + i_g * N
    dy += (start + o_i) * stride_dy
    if i_b == 2:
        rows = across
        columns = across

    # [TILE, BLOCK_N]
    b_C = load_tile(C, stride_C, o_t, m_i, N, BLOCK_N)
    b_B = load_tile(B, stride_B, o_t, m_j, N, BLOCK_N)
    # [TILE, TILE]
    b_CB = tl.dot(b_C, tl.trans(b_B), input_precision=PRECISION)
    if i_b < 2:
        b_own = tl.sum(tl.where(o_t[:, None] == o_t[None, :], b_CB, 0.0), 1)
        tl.store(own + i_g * T + start + o_i + o_t, b_own, mask=m_i)
    m = o_i - o_j + o_t[:, None] > o_t[None, :]
    b_CB = tl.where(m, b_CB, 0.0)
    b_dM = tl.zeros([TILE, TILE], tl.float32)

    first_head = i_g * HEADS_OF_GROUP
    for h in tl.range(first_head, first_head + HEADS_OF_GROUP, num_stages=STAGES):
        row = h * T + start
        # [TILE, BLOCK_P]
        b_dy = load_tile(dy + h * P, stride_dy, o_t, m_i, P, BLOCK_P)
        b_x = load_tile(x + h * P, stride_x, o_t, m_j, P, BLOCK_P)
        # [TILE]
        b_steps = load_steps(steps + row * 2, o_i, o_j, length, TILE)
        b_a, _, b_aj, b_dt = split_steps(b_steps)
        b_M = tl.dot(b_dy, tl.trans(b_x), input_precision=PRECISION)
        b_M *= decay_down(b_a[:, None] - b_aj[None, :])
        b_G = (b_M * b_CB).to(rows.dtype.element_ty)
        tl.store(columns + row + o_j + o_t, tl.sum(b_G, 0), mask=m_j)
        b_G *= b_dt[None, :]
        tl.store(rows + row + o_i + o_t, tl.sum(b_G, 1), mask=m_i)
        b_dM += b_M * b_dt[None, :]

    b_dM = tl.where(o_i - o_j + o_t[:, None] >= o_t[None, :], b_dM, 0.0)
    p_dM = dM + ((i_c * 3 + i_b) * n_g + i_g) * (TILE * TILE)
    tl.store(p_dM + o_t[:, None] * TILE + o_t[None, :], b_dM.to(dM.dtype.element_ty))
