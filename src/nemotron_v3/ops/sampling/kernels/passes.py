"""The passes over the logits before a token is known (README.md). Letters: see `parts.py`."""

import triton.language as tl

from nemotron_v3.ops.common.jit import kernel
from nemotron_v3.ops.sampling.kernels.parts import (
    C_BINS,
    C_BITS,
    C_LEVELS,
    C_NONE,
    C_TOP_K,
    C_TOP_P,
    HUGE,
    TINY,
    applies,
    is_finite,
    key_of,
    load_shaped,
    mass_kept,
    mass_of,
    pick,
    record_of,
    row_stats,
    store_bins,
)


@kernel
def stats_kernel(
    logits,
    active,
    penalty,
    seen,
    stats,
    V,
    blocks,
    stride,
    SIZE: tl.constexpr,
    PENALIZED: tl.constexpr,
):
    """A chunk of a row: see `row_stats`."""
    i_r, i_c = (tl.program_id(0) // blocks).to(tl.int64), tl.program_id(0) % blocks
    if tl.load(active + i_r) != 0:
        o_v = i_c * SIZE + tl.arange(0, SIZE)
        m_v = o_v < V
        p_seen = seen
        if PENALIZED:
            p_seen = seen + i_r * V
        b_l, b_shaped = load_shaped(
            logits + i_r * stride, p_seen, penalty + i_r, o_v, m_v, PENALIZED
        )
        peak = tl.max(tl.where(b_l == b_l, b_l, float("inf")), 0)
        base = tl.where(is_finite(peak), peak, 0.0)
        b_e = tl.where(b_l > float("-inf"), tl.exp(b_l - base), 0.0)
        top = tl.max(b_shaped, 0)
        token = tl.min(tl.where((b_shaped == top) & m_v, o_v, V), 0)
        p_stats = stats + tl.program_id(0).to(tl.int64) * 4
        tl.store(p_stats, peak.to(tl.float64))
        tl.store(p_stats + 1, tl.sum(b_e.to(tl.float64), 0))
        tl.store(p_stats + 2, top.to(tl.float64))
        tl.store(p_stats + 3, token.to(tl.float64))


@kernel
def scale_kernel(
    logits,
    active,
    penalty,
    seen,
    temperature,
    min_p,
    stats,
    below,
    floors,
    table,
    V,
    blocks,
    stride,
    ROWS: tl.constexpr,
    COLUMNS: tl.constexpr,
    BLOCK_C: tl.constexpr,
    PENALIZED: tl.constexpr,
    FLOORED: tl.constexpr,
    CUT: tl.constexpr,
    COUNTED: tl.constexpr,
):
    """A chunk of a row: `below`, the mass that min-p keeps of it, and, if CUT, its first bins."""
    i_r, i_c = (tl.program_id(0) // blocks).to(tl.int64), tl.program_id(0) % blocks
    peak, sum_, top, token = row_stats(stats + i_r * blocks * 4, blocks, BLOCK_C)
    T = tl.load(temperature + i_r).to(tl.float32)
    if (tl.load(active + i_r) != 0) & (T > 0) & is_finite(peak):
        o_v = i_c * ROWS * COLUMNS + tl.arange(0, ROWS)[:, None] * COLUMNS
        o_v = o_v + tl.arange(0, COLUMNS)[None, :]
        m_v = o_v < V
        p_seen = seen
        if PENALIZED:
            p_seen = seen + i_r * V
        b_l, b_shaped = load_shaped(
            logits + i_r * stride, p_seen, penalty + i_r, o_v, m_v, PENALIZED
        )
        b_T = tl.zeros_like(b_shaped) + tl.minimum(tl.maximum(T, TINY), HUGE)
        b_below = tl.div_rn(top.to(tl.float32) - b_shaped, b_T)
        b_below = tl.where(b_shaped > float("-inf"), b_below, float("inf"))
        tl.store(below + i_r * V + o_v, b_below, mask=m_v)
        b_e = mass_of(b_below)
        if FLOORED:
            b_e = tl.where(b_e >= tl.load(min_p + i_r).to(tl.float32), b_e, 0.0)
        b_sum = tl.sum(b_e, 0).to(tl.float64)
        tl.store(floors + tl.program_id(0), tl.sum(b_sum, 0))
        if CUT:
            SHIFT: tl.constexpr = C_BITS * (C_LEVELS - 1)
            b_bin = tl.where(m_v, key_of(b_below) >> SHIFT, -1)
            p_table = table + tl.program_id(0).to(tl.int64) * (C_BINS * 2)
            store_bins(p_table, b_below, b_bin, COUNTED)


@kernel
def descend_kernel(
    below,
    active,
    temperature,
    top_k,
    top_p,
    uniform,
    drawn,
    stats,
    floors,
    tables,
    records,
    kept,
    V,
    R,
    blocks,
    n,
    level,
    QUERY: tl.constexpr,
    PREVIOUS: tl.constexpr,
    FIRST: tl.constexpr,
    COUNTED: tl.constexpr,
    ROWS: tl.constexpr,
    COLUMNS: tl.constexpr,
    BLOCK_C: tl.constexpr,
    BY_K: tl.constexpr,
    BY_P: tl.constexpr,
):
    """A level of a search, from 1 on: from the bins of the level above to those of the one chosen.

    FIRST is whether `level` is 1. The new bins are COUNTED for top-k, which goes by numbers, and at
    the last level of top-p, where the equal tokens of a key are. All programs of a row choose
    alike. The first level, whose bins all searches share, is that of `scale_kernel`; a search
    begins by what the PREVIOUS one kept.
    """
    i_r, i_c = (tl.program_id(0) // blocks).to(tl.int64), tl.program_id(0) % blocks
    size = R.to(tl.int64) * blocks * (C_BINS * 2)  # of a level's table
    p_table = tables + i_r * blocks * (C_BINS * 2)
    peak, sum_, top, token = row_stats(stats + i_r * blocks * 4, blocks, BLOCK_C)
    draws = (tl.load(temperature + i_r).to(tl.float32) > 0) & is_finite(peak)
    if (tl.load(active + i_r) != 0) & draws:
        if FIRST:
            o_c = tl.arange(0, BLOCK_C)
            if PREVIOUS == C_NONE:
                o_b = tl.arange(0, C_BINS)
                p_bins = p_table + (o_c[:, None] * C_BINS + o_b[None, :]) * 2
                m_b = (o_c < blocks)[:, None] & (o_b < C_BINS)[None, :]
                before = tl.sum(tl.sum(tl.load(p_bins, mask=m_b, other=0.0), 1), 0)
            else:
                p_last = record_of(records, i_r, R, PREVIOUS, C_LEVELS - 1)
                found = mass_kept(
                    p_table + (C_LEVELS - 1) * size, p_last, blocks, PREVIOUS, BLOCK_C
                )
                is_cut = applies(top_k + i_r, top_p + i_r, V, PREVIOUS, BY_K, BY_P)
                before = tl.where(is_cut, found, tl.load(kept + PREVIOUS * R + i_r))
            if i_c == 0:
                tl.store(kept + QUERY * R + i_r, before)
            if QUERY == C_TOP_K:
                target = tl.load(top_k + i_r).to(tl.float64)
            elif QUERY == C_TOP_P:
                target = tl.load(top_p + i_r).to(tl.float32).to(tl.float64) * before
            else:
                b_floor = tl.load(floors + i_r * blocks + o_c, mask=o_c < blocks, other=0.0)
                number = tl.load(uniform + (tl.load(drawn + i_r) % n) * R + i_r)
                target = number * tl.minimum(before, tl.sum(b_floor, 0))
            low, before, count = target * 0.0, target * 0.0, target * 0.0
        else:
            p_above = record_of(records, i_r, R, QUERY, level - 1)
            low, before = tl.load(p_above), tl.load(p_above + 1)
            count, target = tl.load(p_above + 2), tl.load(p_above + 3)
        if applies(top_k + i_r, top_p + i_r, V, QUERY, BY_K, BY_P):
            shift = C_BITS * (C_LEVELS - 1 - level)
            p_from = p_table + (level - 1) * size
            i_b, before, count, mass, number_of = pick(
                p_from, blocks, before, count, target, QUERY, QUERY == C_TOP_K, BLOCK_C
            )
            first = low.to(tl.int32) + (i_b << (shift + C_BITS))
            if i_c == 0:
                p_record = record_of(records, i_r, R, QUERY, level)
                tl.store(p_record, first.to(tl.float64))
                tl.store(p_record + 1, before)
                tl.store(p_record + 2, count)
                tl.store(p_record + 3, target)
            o_v = i_c * ROWS * COLUMNS + tl.arange(0, ROWS)[:, None] * COLUMNS
            o_v = o_v + tl.arange(0, COLUMNS)[None, :]
            b_below = tl.load(below + i_r * V + o_v, mask=o_v < V, other=float("inf"))
            b_key = tl.where(o_v < V, key_of(b_below) - first, -1)
            b_bin = b_key >> shift  # -1 of what comes before, BINS or more of what comes after
            store_bins(p_table + level * size + i_c * (C_BINS * 2), b_below, b_bin, COUNTED)
