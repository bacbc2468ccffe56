"""The router's kernel of a decode step: norm, logits, choice, and the choices by expert.

Letters: R rows, D hidden size, E experts, K choices a row.
"""

import triton
import triton.language as tl

from nemotron_v3.ops.common.early import start_early
from nemotron_v3.ops.common.jit import kernel
from nemotron_v3.ops.router.kernels.choose import OUT, _first_largest, _keep_groups, _key


@kernel
def route_kernel(
    x,
    gain,
    gate,
    bias,
    active,
    normed,
    logits,
    weights,
    experts,
    slots,
    choices,
    counters,
    R,
    D,
    eps,
    factor,
    stride_x,
    SIZES: tl.constexpr,
    BY_BIASED: tl.constexpr,
    SLOTS: tl.constexpr,
    SORT: tl.constexpr,
    BLOCK_E: tl.constexpr,
    BLOCK_R: tl.constexpr,
    ALL_D: tl.constexpr,
    PDL: tl.constexpr,
):
    """Programs of one row compute its logits, a block of experts each; the last of them to arrive
    chooses, and the last of all rows sorts the choices. Nobody waits.

    SIZES are the router's own, of one token.

    Writes:
        normed: `[R, D]`, what the experts see.
        weights: fp32 `[R, K]`, factor included; experts: int32 `[R, K]`, -1 for an inactive row.
        slots: int32 `[3, SLOTS]`: the experts that were chosen, in order, -1 behind the last; where
            the choices of each begin in `choices`, and how many there are.
        choices: int32 `[R K]`: numbers `row K + choice`, by expert and then by row.
        counters: int32 `[R + 1]`, 0 before and after.
    """
    start_early(PDL)
    r = tl.program_id(1)
    p_x = x + r.to(tl.int64) * stride_x
    _logits(p_x, gain, gate, normed, logits, r, D, eps, SIZES.E, BLOCK_E, ALL_D)
    tl.debug_barrier()
    if tl.atomic_add(counters + r, 1, sem="acq_rel") == tl.num_programs(0) - 1:
        tl.store(counters + r, 0)
        tl.debug_barrier()
        p_logits = logits + r * SIZES.E
        _choose(p_logits, bias, active, weights, experts, r, factor, SIZES, BY_BIASED)
        if SORT:  # the choices of one row need no order
            tl.debug_barrier()
            if tl.atomic_add(counters + R, 1, sem="acq_rel") == R - 1:
                tl.store(counters + R, 0)
                tl.debug_barrier()
                _sort(experts, slots, choices, R, SLOTS, BLOCK_R, SIZES)


@triton.jit
def _logits(
    x,
    gain,
    gate,
    normed,
    logits,
    r,
    D,
    eps,
    E: tl.constexpr,
    BLOCK_E: tl.constexpr,
    ALL_D: tl.constexpr,
):
    """Logits of BLOCK_E experts, in one piece: every load is on its way before the first is needed.

    The choice hangs on the rounding of its inputs: they are what the norm's own result is.
    """
    o_e = tl.program_id(0) * BLOCK_E + tl.arange(0, BLOCK_E)
    o_d = tl.arange(0, ALL_D)
    m_e, m_d = o_e < E, o_d < D
    p_w = gate + o_e[:, None].to(tl.int64) * D + o_d[None, :]
    b_w = tl.load(p_w, mask=m_e[:, None] & m_d[None, :], other=0.0)
    b_x = tl.load(x + o_d, mask=m_d, other=0.0).to(tl.float32)
    b_gain = tl.load(gain + o_d, mask=m_d, other=0.0).to(tl.float32)
    b_scale = 1.0 / tl.sqrt_rn(tl.sum(b_x * b_x) / D + eps)
    b_y = (b_x * b_scale * b_gain).to(normed.dtype.element_ty)
    if tl.program_id(0) == 0:
        tl.store(normed + r.to(tl.int64) * D + o_d, b_y, mask=m_d)
    b_sum = tl.sum(b_w.to(tl.float32) * b_y.to(tl.float32)[None, :], 1)
    tl.store(logits + r * E + o_e, b_sum, mask=m_e)


@triton.jit
def _choose(
    p_logits,
    bias,
    active,
    weights,
    experts,
    r,
    factor,
    SIZES: tl.constexpr,
    BY_BIASED: tl.constexpr,
):
    """The choice of `nemotron_v3.ops.router`, ties included."""
    K: tl.constexpr = SIZES.K
    o_e, o_k = tl.arange(0, SIZES.BLOCK_E), tl.arange(0, SIZES.BLOCK_K)
    m_e = o_e < SIZES.E
    b_logit = tl.load(p_logits + o_e, mask=m_e, other=0.0)[None, :]
    b_s = 1.0 / (1.0 + tl.exp(-b_logit))
    b_c = b_s + tl.load(bias + o_e, mask=m_e, other=0.0).to(tl.float32)[None, :]
    b_key = tl.where(m_e[None, :], _key(b_c), OUT)
    if SIZES.GROUPS > 1:
        b_key = _keep_groups(b_key, b_c, o_e, SIZES)
    b_weight = tl.zeros([1, tl.constexpr(SIZES.BLOCK_K)], tl.float32)
    b_expert = tl.full([1, tl.constexpr(SIZES.BLOCK_K)], -1, tl.int32)
    for k in tl.static_range(K):
        b_best = _first_largest(b_key, o_e, SIZES.BLOCK_E)
        m_best = o_e[None, :] == b_best[:, None]
        b_value = tl.sum(tl.where(m_best, b_c if BY_BIASED else b_s, 0.0), 1)
        b_key = tl.where(m_best, OUT, b_key)
        b_weight = tl.where((o_k == k)[None, :], b_value[:, None], b_weight)
        b_expert = tl.where((o_k == k)[None, :], b_best[:, None], b_expert)
    if SIZES.NORMALISE:
        b_weight = b_weight / (tl.sum(b_weight, 1) + 1e-20)[:, None]
    b_expert = tl.where(tl.load(active + r) != 0, b_expert, -1)
    o_rk = r * K + o_k[None, :]
    tl.store(weights + o_rk, b_weight * factor, mask=(o_k < K)[None, :])
    tl.store(experts + o_rk, b_expert, mask=(o_k < K)[None, :])


@triton.jit
def _sort(
    experts, slots, choices, R, SLOTS: tl.constexpr, BLOCK_R: tl.constexpr, SIZES: tl.constexpr
):
    """The choices by expert: counted, then put to their places."""
    K: tl.constexpr = SIZES.K
    ALL_E: tl.constexpr = SIZES.BLOCK_E
    o_e = tl.arange(0, ALL_E)
    b_count = tl.zeros([ALL_E], tl.int32)
    for first in range(0, R, BLOCK_R):
        o_r = first + tl.arange(0, BLOCK_R)
        b_count += tl.sum(_chosen(experts, o_r, R, K, BLOCK_R, ALL_E), 0)
    b_start = tl.cumsum(b_count, 0) - b_count
    b_used = (b_count > 0).to(tl.int32)
    b_slot = tl.cumsum(b_used, 0) - b_used
    for s in range(0, SLOTS, ALL_E):
        tl.store(slots + s + o_e, tl.full([ALL_E], -1, tl.int32), mask=s + o_e < SLOTS)
    tl.debug_barrier()
    tl.store(slots + b_slot, o_e, mask=b_used > 0)
    tl.store(slots + SLOTS + b_slot, b_start, mask=b_used > 0)
    tl.store(slots + 2 * SLOTS + b_slot, b_count, mask=b_used > 0)
    b_next = b_start
    for first in range(0, R, BLOCK_R):
        o_r = first + tl.arange(0, BLOCK_R)
        b_chosen = _chosen(experts, o_r, R, K, BLOCK_R, ALL_E)
        b_place = b_next[None, :] + tl.cumsum(b_chosen, 0) - b_chosen
        for k in tl.static_range(K):
            b_e = tl.load(experts + o_r * K + k, mask=o_r < R, other=-1)
            b_at = tl.sum(tl.where(o_e[None, :] == b_e[:, None], b_place, 0), 1)
            tl.store(choices + b_at, o_r * K + k, mask=b_e >= 0)
        b_next += tl.sum(b_chosen, 0)


@triton.jit
def _chosen(experts, o_r, R, K: tl.constexpr, BLOCK_R: tl.constexpr, ALL_E: tl.constexpr):
    """1 where a row has chosen an expert, `[BLOCK_R, ALL_E]`."""
    o_e = tl.arange(0, ALL_E)
    b_chosen = tl.zeros([BLOCK_R, ALL_E], tl.int32)
    for k in tl.static_range(K):
        b_e = tl.load(experts + o_r * K + k, mask=o_r < R, other=-1)
        b_chosen += (o_e[None, :] == b_e[:, None]).to(tl.int32)
    return b_chosen
