"""Pairs of a chunk's tokens: what dB and dC take from them, summed over heads, and their weights.

Letters as in chunk_scan_fwd.py. dB and dC then multiply each block of pairs once, and not for each
head.
"""

import triton
import triton.language as tl

from nemotron_v3.ops.common.jit import kernel
from nemotron_v3.ops.ssd.kernels.loads import (
    decay_down,
    load_dA,
    load_group,
    load_head,
    split_dA,
)
from nemotron_v3.ops.ssd.kernels.state_passing import Passed, pass_states


@kernel
def chunk_bwd_dcb_kernel(
    x,
    B,
    C,
    dA_cumsum,
    dy,
    dfinal_states,
    dstates,
    dinitial_states,
    dM,
    ddA_rows,
    ddA_columns,
    ddA_across,
    CB_diagonal,
    chunk_start,
    chunk_end,
    cu_seqlens,
    document_chunks,
    T,
    H,
    passing_programs,
    STRIDES: tl.constexpr,
    SIZES: tl.constexpr,
    PASSING: tl.constexpr,
    STAGES: tl.constexpr,
):
    """The first `passing_programs` programs leave the gradients of the states, which nothing else
    here needs.

    The pairs come in the order in which the states pass, with whose programs they share the loads
    of dy.
    """
    i = tl.program_id(0)
    if i < passing_programs:
        states = Passed(dy, C, dA_cumsum, dfinal_states, dstates, dinitial_states)
        pass_states(
            *(i, states, cu_seqlens, document_chunks, T, H),
            *(STRIDES.dy, STRIDES.C, SIZES, PASSING, True),
        )
    else:
        i -= passing_programs
        n_g = H // SIZES.HEADS_OF_GROUP
        n_c = (tl.num_programs(0) - passing_programs) // (3 * n_g)
        i_c = (n_c - 1 - i // n_g // 3).to(tl.int64)
        start = tl.load(chunk_start + i_c)
        length = (tl.load(chunk_end + i_c) - start).to(tl.int32)
        inputs = (x, B, C, dA_cumsum, dy)
        outputs = (dM, ddA_rows, ddA_columns, ddA_across, CB_diagonal)
        block = (i_c, (i // n_g) % 3, (i % n_g).to(tl.int64), start, length)
        _dcb(*inputs, *outputs, *block, T, H, STRIDES, SIZES, STAGES)


@triton.jit
def _dcb(
    x,
    B,
    C,
    dA_cumsum,
    dy,
    dM,
    ddA_rows,
    ddA_columns,
    ddA_across,
    CB_diagonal,
    i_c,
    i_b,
    i_g,
    start,
    length,
    T,
    H,
    STRIDES: tl.constexpr,
    SIZES: tl.constexpr,
    STAGES: tl.constexpr,
):
    """Pairs of tokens j <= i of one block of a chunk: its first tile, its second, or across them.

        dM_ij = sum_h (dy_i . x_j) e^(a_i - a_j) dt_j

    over the heads of a group, for dB and dC. For dt and A, of each head, the weights of pairs
    j < i, `G_ij = (dy_i . x_j) (C_i . B_j) e^(a_i - a_j)`: in a tile, times dt_j and summed over j
    (`ddA_rows`, by i), and summed over i (`ddA_columns`, by j); between the tiles, the same by the
    token that lies in the tile (`ddA_across`). And of each group `CB_diagonal`, C_i . B_i. Pairs of
    a token with itself are left out: chunk_cumsum.py subtracts sums from each other, which would
    cancel them, but not quite.
    """
    n_g = H // SIZES.HEADS_OF_GROUP
    o_i = tl.where(i_b > 0, SIZES.TILE, 0)
    o_j = tl.where(i_b == 1, SIZES.TILE, 0)
    o_t = tl.arange(0, SIZES.TILE)
    m_i = o_i + o_t < length
    m_j = o_j + o_t < length
    x += (start + o_j) * STRIDES.x
    B += (start + o_j) * STRIDES.B + i_g * SIZES.N
    C += (start + o_i) * STRIDES.C + i_g * SIZES.N
    dy += (start + o_i) * STRIDES.dy
    if i_b == 2:
        ddA_rows = ddA_across
        ddA_columns = ddA_across

    # [TILE, BLOCK_N]
    b_C = load_group(C, STRIDES.C, o_t, m_i, SIZES)
    b_B = load_group(B, STRIDES.B, o_t, m_j, SIZES)
    # [TILE, TILE]
    b_CB = tl.dot(b_C, tl.trans(b_B), input_precision=SIZES.PRECISION)
    if i_b < 2:
        b_own = tl.sum(tl.where(o_t[:, None] == o_t[None, :], b_CB, 0.0), 1)
        tl.store(CB_diagonal + i_g * T + start + o_i + o_t, b_own, mask=m_i)
    m = o_i - o_j + o_t[:, None] > o_t[None, :]
    b_CB = tl.where(m, b_CB, 0.0)
    b_dM = tl.zeros([tl.constexpr(SIZES.TILE), tl.constexpr(SIZES.TILE)], tl.float32)

    first_head = i_g * SIZES.HEADS_OF_GROUP
    for h in tl.range(first_head, first_head + SIZES.HEADS_OF_GROUP, num_stages=STAGES):
        row = h * T + start
        # [TILE, BLOCK_P]
        b_dy = load_head(dy + h * SIZES.P, STRIDES.dy, o_t, m_i, SIZES)
        b_x = load_head(x + h * SIZES.P, STRIDES.x, o_t, m_j, SIZES)
        # [TILE]
        b_dA = load_dA(dA_cumsum + row * 2, o_i, o_j, length, SIZES.TILE)
        b_a, _, b_aj, b_dt = split_dA(b_dA)
        b_M = tl.dot(b_dy, tl.trans(b_x), input_precision=SIZES.PRECISION)
        b_M *= decay_down(b_a[:, None] - b_aj[None, :])
        b_G = (b_M * b_CB).to(ddA_rows.dtype.element_ty)
        tl.store(ddA_columns + row + o_j + o_t, tl.sum(b_G, 0), mask=m_j)
        b_G *= b_dt[None, :]
        tl.store(ddA_rows + row + o_i + o_t, tl.sum(b_G, 1), mask=m_i)
        b_dM += b_M * b_dt[None, :]

    b_dM = tl.where(o_i - o_j + o_t[:, None] >= o_t[None, :], b_dM, 0.0)
    p_dM = dM + ((i_c * 3 + i_b) * n_g + i_g) * (SIZES.TILE * SIZES.TILE)
    tl.store(p_dM + o_t[:, None] * SIZES.TILE + o_t[None, :], b_dM.to(dM.dtype.element_ty))
