"""The token of a row, in the one chunk where it lies. Letters: see `parts.py`."""

import triton
import triton.language as tl

from nemotron_v3.ops.common.jit import kernel
from nemotron_v3.ops.sampling.kernels.parts import (
    C_BINS,
    C_DRAW,
    C_LEVELS,
    C_NO_TOKEN,
    applies,
    is_finite,
    key_of,
    mass_of,
    pick,
    record_of,
    row_stats,
)


@triton.jit
def _cell_of(
    tables,
    records,
    i_r,
    R,
    blocks,
    BLOCK_C: tl.constexpr,
):
    """The key that the search for the draw has found, its mass by chunk, what comes before it, and
    the target."""
    o_c = tl.arange(0, BLOCK_C)
    size = R.to(tl.int64) * blocks * (C_BINS * 2)
    p_table = tables + (C_LEVELS - 1) * size + i_r * blocks * (C_BINS * 2)
    p_last = record_of(records, i_r, R, C_DRAW, C_LEVELS - 1)
    before, target = tl.load(p_last + 1), tl.load(p_last + 3)
    i_b, before, count, mass, number = pick(
        p_table, blocks, before, before, target, C_DRAW, False, BLOCK_C
    )
    p_mass = p_table + (o_c * C_BINS + i_b) * 2
    b_mass = tl.load(p_mass, mask=o_c < blocks, other=0.0)
    return tl.load(p_last).to(tl.int32) + i_b, b_mass, before, target


@triton.jit
def _token_at(
    p_below,
    b_mass,
    before,
    target,
    is_cut,
    cell,
    least,
    V,
    SIZE: tl.constexpr,
    BLOCK_C: tl.constexpr,
):
    """The first token up to which mass exceeds the target, of those of a cell or of `least` mass.

    Where rounding lets none exceed it, the last one.
    """
    o_c = tl.arange(0, BLOCK_C)
    b_passed = (before + tl.cumsum(b_mass, 0) > target) & (b_mass > 0)
    i_c = tl.min(tl.where(b_passed, o_c, BLOCK_C), 0)
    last = tl.max(tl.where(b_mass > 0, o_c, 0), 0)
    i_c = tl.where(i_c < BLOCK_C, i_c, last)
    before += tl.sum(tl.where(o_c < i_c, b_mass, 0.0), 0)
    o_v = i_c * SIZE + tl.arange(0, SIZE)
    b_below = tl.load(p_below + o_v, mask=o_v < V, other=float("inf"))
    b_e = tl.where(o_v < V, mass_of(b_below), 0.0)
    b_kept = (b_e > 0) & tl.where(is_cut, key_of(b_below) == cell, b_e >= least)
    b_upto = before + tl.cumsum(tl.where(b_kept, b_e, 0.0).to(tl.float64), 0)
    first = tl.min(tl.where(b_kept & (b_upto > target), o_v, V), 0)
    last = tl.max(tl.where(b_kept, o_v, 0), 0)
    return tl.where(first < V, first, last).to(tl.int64)


@kernel
def finish_kernel(
    logits,
    active,
    seen,
    temperature,
    top_k,
    top_p,
    min_p,
    uniform,
    drawn,
    stats,
    below,
    floors,
    tables,
    records,
    logprobs,
    out,
    V,
    R,
    blocks,
    n,
    stride,
    SIZE: tl.constexpr,
    BLOCK_C: tl.constexpr,
    SAMPLED: tl.constexpr,
    FLOORED: tl.constexpr,
    BY_K: tl.constexpr,
    BY_P: tl.constexpr,
    PENALIZED: tl.constexpr,
    LOGGED: tl.constexpr,
):
    """A row: the token, and what is kept of it."""
    i_r = tl.program_id(0).to(tl.int64)
    if tl.load(active + i_r) != 0:
        peak, total, top, token = row_stats(stats + i_r * blocks * 4, blocks, BLOCK_C)
        draws = tl.load(active + i_r) == 0
        if SAMPLED:
            draws = tl.load(temperature + i_r).to(tl.float32) > 0
        if draws:
            times = tl.load(drawn + i_r)
            tl.store(drawn + i_r, times + 1)
            if is_finite(peak):
                # What min-p keeps, or the cell that the search has found.
                o_c = tl.arange(0, BLOCK_C)
                b_mass = tl.load(floors + i_r * blocks + o_c, mask=o_c < blocks, other=0.0)
                number = tl.load(uniform + (times % n) * R + i_r)
                target, before = number * tl.sum(b_mass, 0), number * 0.0
                is_cut = times < 0
                cell = token.to(tl.int32)
                if BY_K or BY_P:
                    is_cut = applies(top_k + i_r, top_p + i_r, V, C_DRAW, BY_K, BY_P)
                    if is_cut:
                        cell, b_mass, before, target = _cell_of(
                            tables, records, i_r, R, blocks, BLOCK_C
                        )
                least = number.to(tl.float32) * 0.0
                if FLOORED:
                    least = tl.load(min_p + i_r).to(tl.float32)
                p_below = below + i_r * V
                token = _token_at(
                    p_below, b_mass, before, target, is_cut, cell, least, V, SIZE, BLOCK_C
                )
        if PENALIZED:
            tl.store(seen + i_r * V + token, 1, mask=is_finite(peak))
        if LOGGED:
            b_l = tl.load(logits + i_r * stride + token).to(tl.float32)
            b_log = (b_l.to(tl.float64) - peak) - tl.log(total.to(tl.float32)).to(tl.float64)
            tl.store(logprobs + i_r, b_log.to(logprobs.dtype.element_ty))
        tl.store(out + i_r, tl.where(is_finite(peak), token, C_NO_TOKEN))
