"""What the kernels of sampling share: logits, keys, and the bins of a search.

Letters: R slots, V vocabulary, n uniform numbers a slot. `below` `[R, V]` is how far a logit lies
below the largest, after temperature; e = exp(-below) is a token's mass. A token's key is `below` in
steps of 2^-23, so the order of keys, and of tokens among equal keys, is that of a sort.
"""

import triton
import triton.language as tl

from nemotron_v3.ops.sampling.reference import NO_TOKEN
from nemotron_v3.ops.sampling.sizes import BINS, LEVELS

TOP_K, TOP_P, DRAW = 0, 1, 2
NONE = -1

# For kernels, which see no other globals.
C_BINS, C_BITS, C_LEVELS = tl.constexpr(BINS), tl.constexpr(4), tl.constexpr(LEVELS)
C_TOP_K, C_TOP_P, C_DRAW = tl.constexpr(TOP_K), tl.constexpr(TOP_P), tl.constexpr(DRAW)
C_NONE, C_NO_TOKEN = tl.constexpr(NONE), tl.constexpr(NO_TOKEN)
_STEPS = tl.constexpr(8388608.0)  # 2^23 keys a unit of the logit
_LAST = tl.constexpr(31.999998)  # what is further below is as good as there
TINY, HUGE = tl.constexpr(1.1754943508222875e-38), tl.constexpr(3.4028234663852886e38)


@triton.jit
def load_shaped(p_logits, p_seen, penalty, o_v, m_v, PENALIZED: tl.constexpr):
    """Logits as they come, and after the penalty; -inf where there is no token."""
    b_l = tl.load(p_logits + o_v, mask=m_v, other=float("-inf")).to(tl.float32)
    b_shaped = b_l
    if PENALIZED:
        b_seen = tl.load(p_seen + o_v, mask=m_v, other=0) != 0
        factor = tl.minimum(tl.maximum(tl.load(penalty).to(tl.float32), TINY), HUGE)
        b_less = tl.where(b_l > 0, tl.div_rn(b_l, tl.zeros_like(b_l) + factor), b_l * factor)
        b_less = tl.minimum(tl.maximum(b_less, -HUGE), HUGE)
        b_shaped = tl.where(b_seen & (b_l > float("-inf")), b_less, b_l)
    return b_l, b_shaped


@triton.jit
def row_stats(p_stats, blocks, BLOCK_C: tl.constexpr):
    """Of a row: the largest logit, the sum of exp below it, the largest shaped one, its token."""
    o_c = tl.arange(0, BLOCK_C)
    m_c = o_c < blocks
    b_peak = tl.load(p_stats + o_c * 4, mask=m_c, other=float("-inf"))
    b_sum = tl.load(p_stats + o_c * 4 + 1, mask=m_c, other=0.0)
    b_top = tl.load(p_stats + o_c * 4 + 2, mask=m_c, other=float("-inf"))
    b_token = tl.load(p_stats + o_c * 4 + 3, mask=m_c, other=0.0)
    peak, top = tl.max(b_peak, 0), tl.max(b_top, 0)
    total = tl.sum(tl.where(b_sum > 0, b_sum * tl.exp((b_peak - peak).to(tl.float32)), 0.0), 0)
    token = tl.min(tl.where(b_top == top, b_token, 1e9), 0)
    return peak, total, top, token.to(tl.int64)


@triton.jit
def is_finite(peak):
    """Of the largest logit, which stands as +inf for NaN too."""
    return (peak > float("-inf")) & (peak < float("inf"))


@triton.jit
def mass_of(b_below):
    return tl.exp(-b_below)


@triton.jit
def key_of(b_below):
    return (tl.minimum(b_below, _LAST) * _STEPS).to(tl.int32)


@triton.jit
def store_bins(p_table, b_below, b_bin, COUNTED: tl.constexpr):
    """Mass, and if COUNTED number, of the tokens in each bin of a chunk `[ROWS, COLUMNS]`."""
    b_e = mass_of(b_below)
    for b in range(C_BINS):  # unrolled it would take seconds to compile
        b_in = b_bin == b
        # A few masses of a thread in fp32, all else in fp64.
        b_mass = tl.sum(tl.where(b_in, b_e, 0.0), 0).to(tl.float64)
        tl.store(p_table + 2 * b, tl.sum(b_mass, 0))
        if COUNTED:
            b_count = tl.sum(b_in.to(tl.int32), 0)
            tl.store(p_table + 2 * b + 1, tl.sum(b_count, 0).to(tl.float64))


@triton.jit
def pick(
    p_table,
    blocks,
    before,
    count,
    target,
    QUERY: tl.constexpr,
    COUNTED: tl.constexpr,
    BLOCK_C: tl.constexpr,
):
    """The bin in which a search goes on, what comes before it, and what it holds.

    Tokens whose mass, or number, is `before`, or `count`, come before all bins. Numbers are 0 where
    the table is not COUNTED.
    """
    o_c, o_b = tl.arange(0, BLOCK_C), tl.arange(0, C_BINS)
    p_bins = p_table + (o_c[:, None] * C_BINS + o_b[None, :]) * 2
    m_c = (o_c < blocks)[:, None] & (o_b < C_BINS)[None, :]
    b_mass = tl.sum(tl.load(p_bins, mask=m_c, other=0.0), 0)
    b_count = tl.zeros_like(b_mass)
    if COUNTED:
        b_count = tl.sum(tl.load(p_bins + 1, mask=m_c, other=0.0), 0)
    if QUERY == C_TOP_K:
        b_there, b_passed = b_count > 0, count + tl.cumsum(b_count, 0) >= target
    elif QUERY == C_TOP_P:
        b_there, b_passed = b_mass > 0, before + tl.cumsum(b_mass, 0) >= target
    else:
        b_there, b_passed = b_mass > 0, before + tl.cumsum(b_mass, 0) > target
    first = tl.min(tl.where(b_there & b_passed, o_b, C_BINS), 0)
    last = tl.max(tl.where(b_there, o_b, 0), 0)  # where rounding lets none pass
    i_b = tl.where(first < C_BINS, first, last)
    before += tl.sum(tl.where(o_b < i_b, b_mass, 0.0), 0)
    count += tl.sum(tl.where(o_b < i_b, b_count, 0.0), 0)
    mass = tl.sum(tl.where(o_b == i_b, b_mass, 0.0), 0)
    number = tl.sum(tl.where(o_b == i_b, b_count, 0.0), 0)
    return i_b, before, count, mass, number


@triton.jit
def mass_kept(p_table, p_record, blocks, QUERY: tl.constexpr, BLOCK_C: tl.constexpr):
    """The mass that a finished search for top-k or top-p keeps; equal tokens have equal masses."""
    before, count = tl.load(p_record + 1), tl.load(p_record + 2)
    target = tl.load(p_record + 3)
    i_b, before, count, mass, number = pick(
        p_table, blocks, before, count, target, QUERY, True, BLOCK_C
    )
    each = mass / tl.maximum(number, 1.0)
    if QUERY == C_TOP_K:
        more = target - count
    else:
        more = tl.ceil((target - before) / tl.maximum(each, 1e-300))
    return before + tl.minimum(tl.maximum(more, 1.0), number) * each


@triton.jit
def applies(p_top_k, p_top_p, V, QUERY: tl.constexpr, BY_K: tl.constexpr, BY_P: tl.constexpr):
    """Whether a row is cut by top-k, by top-p, or, for the draw, by any of them."""
    by_k = V < 0
    by_p = V < 0
    if BY_K and QUERY != C_TOP_P:
        k = tl.load(p_top_k)
        by_k = (k > 0) & (k < V)
    if BY_P and QUERY != C_TOP_K:
        by_p = tl.load(p_top_p).to(tl.float32) < 1.0
    return by_k | by_p


@triton.jit
def record_of(records, i_r, R, QUERY: tl.constexpr, level):
    """Where a search of a row stands at a level: first key, mass and number before it, target."""
    return records + ((QUERY * C_LEVELS + level) * R + i_r) * 4
