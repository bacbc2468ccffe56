"""The router's kernel of a decode step: norm, logits, choice, and the choices by expert.

Letters: R rows, D hidden size, E experts, K choices a row.
"""

import triton
import triton.language as tl

from nemotron_v3.ops.router.kernels.choose import OUT, _first_largest, _keep_groups, _key
from nemotron_v3.ops.skinny_linear.tiles import multiply


@triton.jit
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
    E: tl.constexpr,
    K: tl.constexpr,
    GROUPS: tl.constexpr,
    KEPT: tl.constexpr,
    NORMALISE: tl.constexpr,
    BY_BIASED: tl.constexpr,
    SLOTS: tl.constexpr,
    TILES: tl.constexpr,
    BLOCK_D: tl.constexpr,
    BLOCK_E: tl.constexpr,
    BLOCK_R: tl.constexpr,
    ALL_E: tl.constexpr,
    ALL_K: tl.constexpr,
    ALL_G: tl.constexpr,
    STAGES: tl.constexpr,
):
    """Programs of one tile of rows compute its logits, a block of experts each; the last of them to
    arrive chooses, and the last of all tiles sorts the choices. Nobody waits.

    Writes:
        normed: `[R, D]`, what the experts see.
        weights: fp32 `[R, K]`, factor included; experts: int32 `[R, K]`, -1 for an inactive row.
        slots: int32 `[3, SLOTS]`: the experts that were chosen, in order, -1 behind the last; where
            the choices of each begin in `choices`, and how many there are.
        choices: int32 `[R K]`: numbers `row K + choice`, by expert and then by row.
        counters: int32 `[TILES + 1]`, 0 before and after.
    """
    tile = tl.program_id(1)
    o_r = tile * BLOCK_R + tl.arange(0, BLOCK_R)
    m_r = o_r < R
    if BLOCK_R == 1:
        _logits_of_one(x, gain, gate, normed, logits, D, eps, E, BLOCK_E, BLOCK_D)
    else:
        _logits(
            x, gain, gate, normed, logits, o_r, m_r, R, D, eps, stride_x, E, BLOCK_D, BLOCK_E,
            BLOCK_R, STAGES,
        )  # fmt: skip
    tl.debug_barrier()
    if tl.atomic_add(counters + tile, 1, sem="acq_rel") == tl.num_programs(0) - 1:
        tl.store(counters + tile, 0)
        tl.debug_barrier()
        _choose(
            logits, bias, active, weights, experts, o_r, m_r, factor, E, K, GROUPS, KEPT, NORMALISE,
            BY_BIASED, BLOCK_R, ALL_E, ALL_K, ALL_G,
        )  # fmt: skip
        if BLOCK_R > 1:  # the choices of one row need no order
            tl.debug_barrier()
            if tl.atomic_add(counters + TILES, 1, sem="acq_rel") == TILES - 1:
                tl.store(counters + TILES, 0)
                tl.debug_barrier()
                _sort(experts, slots, choices, R, K, SLOTS, TILES, BLOCK_R, ALL_E, ALL_K)


@triton.jit
def _logits(
    x,
    gain,
    gate,
    normed,
    logits,
    o_r,
    m_r,
    R,
    D,
    eps,
    stride_x,
    E: tl.constexpr,
    BLOCK_D: tl.constexpr,
    BLOCK_E: tl.constexpr,
    BLOCK_R: tl.constexpr,
    STAGES: tl.constexpr,
):
    """Logits of BLOCK_E experts, and this program's part of the normalised rows."""
    o_e = tl.program_id(0) * BLOCK_E + tl.arange(0, BLOCK_E)
    m_e = o_e < E
    o_d = tl.arange(0, BLOCK_D)
    p_x = x + o_r.to(tl.int64) * stride_x
    p_w = gate + o_e.to(tl.int64) * D
    # The choice hangs on the rounding of its inputs: they are what the norm's own result is.
    o_wide = tl.arange(0, 4 * BLOCK_D)
    b_square = tl.zeros([BLOCK_R], tl.float32)
    for k in tl.range(0, D, 4 * BLOCK_D, num_stages=STAGES):
        m_x = m_r[:, None] & (k + o_wide < D)[None, :]
        b_x = tl.load(p_x[:, None] + (k + o_wide)[None, :], mask=m_x, other=0.0).to(tl.float32)
        b_square += tl.sum(b_x * b_x, 1)
    b_scale = 1.0 / tl.sqrt_rn(b_square / D + eps)
    b_sum = tl.zeros([BLOCK_E, BLOCK_R], tl.float32)
    for k in tl.range(0, D, BLOCK_D, num_stages=STAGES):
        m_d = k + o_d < D
        # [BLOCK_E, BLOCK_D], [BLOCK_D, BLOCK_R], [BLOCK_D]
        b_w = tl.load(p_w[:, None] + (k + o_d)[None, :], mask=m_e[:, None] & m_d[None, :], other=0.0)
        m_x = m_r[None, :] & m_d[:, None]
        b_x = tl.load(p_x[None, :] + (k + o_d)[:, None], mask=m_x, other=0.0).to(tl.float32)
        b_gain = tl.load(gain + k + o_d, mask=m_d, other=0.0).to(tl.float32)
        b_y = (b_x * b_scale[None, :] * b_gain[:, None]).to(normed.dtype.element_ty)
        b_sum += multiply(b_w, b_y)
    p_logits = logits + o_r[None, :] * E + o_e[:, None]
    tl.store(p_logits, b_sum, mask=m_e[:, None] & m_r[None, :])
    for k in range(tl.program_id(0) * BLOCK_D, D, tl.num_programs(0) * BLOCK_D):
        m_x = m_r[None, :] & (k + o_d < D)[:, None]
        b_x = tl.load(p_x[None, :] + (k + o_d)[:, None], mask=m_x, other=0.0).to(tl.float32)
        b_gain = tl.load(gain + k + o_d, mask=k + o_d < D, other=0.0).to(tl.float32)
        b_y = (b_x * b_scale[None, :] * b_gain[:, None]).to(normed.dtype.element_ty)
        p_y = normed + o_r.to(tl.int64)[None, :] * D + (k + o_d)[:, None]
        tl.store(p_y, b_y, mask=m_x)


@triton.jit
def _logits_of_one(
    x,
    gain,
    gate,
    normed,
    logits,
    D,
    eps,
    E: tl.constexpr,
    BLOCK_E: tl.constexpr,
    ALL_D: tl.constexpr,
):
    """The same for one row, in one piece: every load is on its way before the first is needed."""
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
        tl.store(normed + o_d, b_y, mask=m_d)
    b_sum = tl.sum(b_w.to(tl.float32) * b_y.to(tl.float32)[None, :], 1)
    tl.store(logits + o_e, b_sum, mask=m_e)


@triton.jit
def _choose(
    logits,
    bias,
    active,
    weights,
    experts,
    o_r,
    m_r,
    factor,
    E: tl.constexpr,
    K: tl.constexpr,
    GROUPS: tl.constexpr,
    KEPT: tl.constexpr,
    NORMALISE: tl.constexpr,
    BY_BIASED: tl.constexpr,
    BLOCK_R: tl.constexpr,
    ALL_E: tl.constexpr,
    ALL_K: tl.constexpr,
    ALL_G: tl.constexpr,
):
    """The choice of `nemotron_v3.ops.router`, ties included."""
    o_e, o_k = tl.arange(0, ALL_E), tl.arange(0, ALL_K)
    m_e = o_e < E
    b_logit = tl.load(
        logits + o_r[:, None] * E + o_e[None, :], mask=m_r[:, None] & m_e[None, :], other=0.0
    )
    b_s = 1.0 / (1.0 + tl.exp(-b_logit))
    b_c = b_s + tl.load(bias + o_e, mask=m_e, other=0.0).to(tl.float32)[None, :]
    b_key = tl.where(m_e[None, :], _key(b_c), OUT)
    if GROUPS > 1:
        b_key = _keep_groups(b_key, b_c, o_e, E // GROUPS, GROUPS, KEPT, BLOCK_R, ALL_E, ALL_G)
    b_weight = tl.zeros([BLOCK_R, ALL_K], tl.float32)
    b_expert = tl.full([BLOCK_R, ALL_K], -1, tl.int32)
    for k in tl.static_range(K):
        b_best = _first_largest(b_key, o_e, ALL_E)
        m_best = o_e[None, :] == b_best[:, None]
        b_value = tl.sum(tl.where(m_best, b_c if BY_BIASED else b_s, 0.0), 1)
        b_key = tl.where(m_best, OUT, b_key)
        b_weight = tl.where((o_k == k)[None, :], b_value[:, None], b_weight)
        b_expert = tl.where((o_k == k)[None, :], b_best[:, None], b_expert)
    if NORMALISE:
        b_weight = b_weight / (tl.sum(b_weight, 1) + 1e-20)[:, None]
    b_active = tl.load(active + o_r, mask=m_r, other=0) != 0
    b_expert = tl.where(b_active[:, None], b_expert, -1)
    o_rk = o_r[:, None] * K + o_k[None, :]
    m_rk = m_r[:, None] & (o_k < K)[None, :]
    tl.store(weights + o_rk, b_weight * factor, mask=m_rk)
    tl.store(experts + o_rk, b_expert, mask=m_rk)


@triton.jit
def _sort(
    experts,
    slots,
    choices,
    R,
    K: tl.constexpr,
    SLOTS: tl.constexpr,
    TILES: tl.constexpr,
    BLOCK_R: tl.constexpr,
    ALL_E: tl.constexpr,
    ALL_K: tl.constexpr,
):
    """The choices by expert: counted, then put to their places."""
    o_e = tl.arange(0, ALL_E)
    b_count = tl.zeros([ALL_E], tl.int32)
    for tile in range(TILES):
        o_r = tile * BLOCK_R + tl.arange(0, BLOCK_R)
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
    for tile in range(TILES):
        o_r = tile * BLOCK_R + tl.arange(0, BLOCK_R)
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
