"""Rows by expert: a stable counting sort on the device, and the tiles of the sorted rows.

Letters: T tokens, K choices a token, R = T*K routed rows, E experts. Nothing is read back: how many
rows an expert has is known to the kernels alone, the host knows only the most there can be.
"""

import triton.language as tl

from nemotron_v3.ops.common.jit import kernel


@kernel
def count_kernel(indices, counts, R, E, BLOCK: tl.constexpr, BLOCK_E: tl.constexpr):
    """`counts[i, e]`: rows of expert e in the i-th block of rows. BLOCK_E is more than E."""
    i_b = tl.program_id(0)
    o_r = i_b * BLOCK + tl.arange(0, BLOCK)
    o_e = tl.arange(0, BLOCK_E)
    # [BLOCK]; what is no row counts for expert E, which is not here and is not counted
    b_e = tl.load(indices + o_r, mask=o_r < R, other=E).to(tl.int32)
    b_count = tl.histogram(b_e, BLOCK_E)
    tl.store(counts + i_b.to(tl.int64) * E + o_e, b_count, mask=o_e < E)


@kernel
def scan_kernel(counts, totals, blocks, E, BLOCK: tl.constexpr, BLOCK_E: tl.constexpr):
    """Turns counts into the number of rows in the blocks before; `totals[e]` is the sum."""
    o_e = tl.program_id(0) * BLOCK_E + tl.arange(0, BLOCK_E)
    m_e = o_e < E
    b_before = tl.zeros([BLOCK_E], tl.int32)
    for i in range(0, blocks, BLOCK):
        o_b = i + tl.arange(0, BLOCK)
        m_be = (o_b < blocks)[:, None] & m_e[None, :]
        # [BLOCK, BLOCK_E]
        p_c = counts + o_b[:, None].to(tl.int64) * E + o_e[None, :]
        b_c = tl.load(p_c, mask=m_be, other=0)
        b_sum = tl.cumsum(b_c, 0)
        tl.store(p_c, b_before[None, :] + b_sum - b_c, mask=m_be)
        b_before += tl.sum(b_c, 0)
    tl.store(totals + o_e, b_before, mask=m_e)


@kernel
def schedule_kernel(
    totals, offsets, tile_first, tile_expert, E, TILE: tl.constexpr, BLOCK_E: tl.constexpr
):
    """First row `[E+1]` and first tile `[E+1]` of each expert, and the expert of each tile."""
    o_e = tl.arange(0, BLOCK_E)
    # [BLOCK_E]
    b_n = tl.load(totals + o_e, mask=o_e < E, other=0)
    b_end = tl.cumsum(b_n, 0)
    b_tiles = (b_n + TILE - 1) // TILE
    b_last = tl.cumsum(b_tiles, 0)
    tl.store(offsets + o_e, b_end - b_n, mask=o_e <= E)
    tl.store(tile_first + o_e, b_last - b_tiles, mask=o_e <= E)
    for i in range(0, tl.max(b_tiles, 0)):
        tl.store(tile_expert + b_last - b_tiles + i, o_e, mask=i < b_tiles)


@kernel
def place_kernel(
    indices,
    weights,
    before,
    offsets,
    place,
    source,
    sorted_weights,
    R,
    E,
    CHOICES: tl.constexpr,
    FLOOR: tl.constexpr,
    BLOCK: tl.constexpr,
    CHUNK: tl.constexpr,
):
    """Where each row goes (`place` `[R]`), and what lies there: its token and its weight.

    A row of expert E, which is not here, goes nowhere: its place is -1. `source` holds
    -1 - token for a row whose weight is nothing.
    """
    i_b = tl.program_id(0)
    first = i_b * BLOCK
    o_i = tl.arange(0, BLOCK)
    o_r = first + o_i
    m_r = o_r < R
    # [BLOCK]
    b_e = tl.load(indices + o_r, mask=m_r, other=E).to(tl.int32)
    m_here = b_e < E
    b_rank = tl.zeros([BLOCK], tl.int32)
    for j in range(0, BLOCK, CHUNK):
        o_j = j + tl.arange(0, CHUNK)
        b_other = tl.load(indices + first + o_j, mask=first + o_j < R, other=E).to(tl.int32)
        b_same = (b_e[:, None] == b_other[None, :]) & (o_j[None, :] < o_i[:, None])
        b_rank += tl.sum(b_same.to(tl.int32), 1)
    b_before = tl.load(before + i_b.to(tl.int64) * E + b_e, mask=m_here, other=0)
    b_p = tl.load(offsets + b_e, mask=m_here, other=0) + b_before + b_rank
    b_w = tl.load(weights + o_r, mask=m_r, other=0.0)
    b_token = o_r // CHOICES
    tl.store(place + o_r, tl.where(m_here, b_p, -1), mask=m_r)
    tl.store(source + b_p, tl.where(tl.abs(b_w) < FLOOR, -1 - b_token, b_token), mask=m_here)
    tl.store(sorted_weights + b_p, b_w, mask=m_here)
