"""The router's kernels: logits, the choice of experts, and the way back to the logits (README.md).

Letters: T tokens, D width, E experts, K choices, G groups of experts. A row's results depend on
that row alone.
"""

from typing import NamedTuple

import triton
import triton.language as tl

from nemotron_v3.ops.common.jit import kernel

OUT = tl.constexpr(-(2**31))  # the key of what cannot be chosen: below that of -inf


@kernel
def logits_kernel(
    x,
    weight,
    logits,
    T,
    D,
    E,
    stride_x,
    BLOCK_T: tl.constexpr,
    BLOCK_E: tl.constexpr,
    BLOCK_D: tl.constexpr,
    STAGES: tl.constexpr,
):
    """`x weight^T` in fp32 of 16-bit operands, whose products are exact in fp32.

    Tensor cores add to a long sum by cutting off, so no sum of theirs is longer than 2 BLOCK_D.
    """
    n_e = tl.cdiv(E, BLOCK_E)
    o_t = (tl.program_id(0) // n_e) * BLOCK_T + tl.arange(0, BLOCK_T)
    o_e = (tl.program_id(0) % n_e) * BLOCK_E + tl.arange(0, BLOCK_E)
    o_d = tl.arange(0, BLOCK_D)
    m_t, m_e = o_t < T, o_e < E
    p_x = x + o_t[:, None].to(tl.int64) * stride_x
    p_w = weight + o_e[None, :].to(tl.int64) * D
    b_sum = tl.zeros([BLOCK_T, BLOCK_E], tl.float32)
    for h in tl.range(0, D, 2 * BLOCK_D, num_stages=STAGES):
        b_part = tl.zeros([BLOCK_T, BLOCK_E], tl.float32)
        for half in tl.static_range(2):
            o_k = h + half * BLOCK_D + o_d
            # [BLOCK_T, BLOCK_D], [BLOCK_D, BLOCK_E]
            b_x = tl.load(p_x + o_k[None, :], mask=m_t[:, None] & (o_k < D)[None, :], other=0.0)
            b_w = tl.load(p_w + o_k[:, None], mask=m_e[None, :] & (o_k < D)[:, None], other=0.0)
            b_part = tl.dot(b_x, b_w, b_part)
        b_sum += b_part
    p_logits = logits + o_t[:, None].to(tl.int64) * E + o_e[None, :]
    tl.store(p_logits, b_sum, mask=m_t[:, None] & m_e[None, :])


class Sizes(NamedTuple):
    """What the kernels of the choice are compiled for.

    Attributes:
        E, K: experts, and how many a token chooses.
        GROUPS, KEPT: groups of experts, and how many of them stay.
        NORMALISE: a token's weights are divided by their sum.
        BLOCK_T: tokens of a program; BLOCK_E, BLOCK_K, BLOCK_G: powers of two that hold E, K and
            GROUPS.
    """

    E: int
    K: int
    GROUPS: int
    KEPT: int
    NORMALISE: bool
    BLOCK_T: int
    BLOCK_E: int
    BLOCK_K: int
    BLOCK_G: int


@triton.jit
def _key(b_c):
    """int32 in the order of the fp32 values; NaN above all, as a choice that must be seen."""
    b_bits = (b_c + 0.0).to(tl.int32, bitcast=True)
    b_key = tl.where(b_bits < 0, b_bits ^ 0x7FFFFFFF, b_bits)
    return tl.where(b_c == b_c, b_key, 0x7FFFFFFF)


@triton.jit
def _first_largest(b_key, o_n, BLOCK: tl.constexpr):
    """Where each row's largest key is; of equal ones the first."""
    b_packed = (b_key.to(tl.int64) << 32) | (BLOCK - 1 - o_n)[None, :].to(tl.int64)
    return BLOCK - 1 - (tl.max(b_packed, 1) & 0xFFFFFFFF).to(tl.int32)


@triton.jit
def _keep_groups(b_key, b_c, o_e, SIZES: tl.constexpr):
    """Takes every expert outside the KEPT groups of highest value out of the choice."""
    GROUPS: tl.constexpr = SIZES.GROUPS
    KEPT: tl.constexpr = SIZES.KEPT
    SIZE: tl.constexpr = SIZES.E // GROUPS
    o_g = tl.arange(0, SIZES.BLOCK_G)
    b_group = tl.full([SIZES.BLOCK_T, SIZES.BLOCK_G], OUT, tl.int32)
    for g in tl.static_range(GROUPS):
        b_own = tl.where((o_e // SIZE == g)[None, :], b_key, OUT)
        b_best = _first_largest(b_own, o_e, SIZES.BLOCK_E)
        b_value = tl.sum(tl.where(o_e[None, :] == b_best[:, None], b_c, 0.0), 1)
        if SIZE > 1:
            b_own = tl.where(o_e[None, :] == b_best[:, None], OUT, b_own)
            b_best = _first_largest(b_own, o_e, SIZES.BLOCK_E)
            b_value += tl.sum(tl.where(o_e[None, :] == b_best[:, None], b_c, 0.0), 1)
        b_group = tl.where((o_g == g)[None, :], _key(b_value)[:, None], b_group)
    b_kept = tl.zeros([SIZES.BLOCK_T, SIZES.BLOCK_E], tl.int32)
    for _ in tl.static_range(KEPT):
        b_best = _first_largest(b_group, o_g, SIZES.BLOCK_G)
        b_group = tl.where(o_g[None, :] == b_best[:, None], OUT, b_group)
        b_kept = tl.where((o_e // SIZE)[None, :] == b_best[:, None], 1, b_kept)
    return tl.where(b_kept > 0, b_key, OUT)


@kernel
def choose_kernel(logits, bias, weights, indices, scores, T, factor, SIZES: tl.constexpr):
    """A token's K experts, the best first, their weights, and their scores for the way back."""
    K: tl.constexpr = SIZES.K
    o_t = tl.program_id(0) * SIZES.BLOCK_T + tl.arange(0, SIZES.BLOCK_T)
    o_e = tl.arange(0, SIZES.BLOCK_E)
    o_k = tl.arange(0, SIZES.BLOCK_K)
    m_t, m_e = o_t < T, o_e < SIZES.E
    # [BLOCK_T, BLOCK_E]
    p_logits = logits + o_t[:, None].to(tl.int64) * SIZES.E + o_e[None, :]
    b_logit = tl.load(p_logits, mask=m_t[:, None] & m_e[None, :], other=0.0)
    b_s = 1.0 / (1.0 + tl.exp(-b_logit))
    b_c = b_s + tl.load(bias + o_e, mask=m_e, other=0.0)[None, :]
    b_key = tl.where(m_e[None, :], _key(b_c), OUT)
    if SIZES.GROUPS > 1:
        b_key = _keep_groups(b_key, b_c, o_e, SIZES)
    b_chosen = tl.zeros([SIZES.BLOCK_T, SIZES.BLOCK_K], tl.float32)
    b_index = tl.zeros([SIZES.BLOCK_T, SIZES.BLOCK_K], tl.int32)
    for k in tl.static_range(K):
        b_best = _first_largest(b_key, o_e, SIZES.BLOCK_E)
        m_best = o_e[None, :] == b_best[:, None]
        b_value = tl.sum(tl.where(m_best, b_s, 0.0), 1)
        b_key = tl.where(m_best, OUT, b_key)
        b_chosen = tl.where((o_k == k)[None, :], b_value[:, None], b_chosen)
        b_index = tl.where((o_k == k)[None, :], b_best[:, None], b_index)
    b_w = b_chosen
    if SIZES.NORMALISE:
        b_w = b_chosen / (tl.sum(b_chosen, 1) + 1e-20)[:, None]
    o_tk = o_t[:, None] * K + o_k[None, :]
    m_tk = m_t[:, None] & (o_k < K)[None, :]
    tl.store(weights + o_tk, b_w * factor, mask=m_tk)
    tl.store(indices + o_tk, b_index.to(tl.int64), mask=m_tk)
    tl.store(scores + o_tk, b_chosen, mask=m_tk)


@kernel
def choose_backward_kernel(
    dweights, scores, indices, dlogits, T, factor, SIZES: tl.constexpr, SPLIT: tl.constexpr
):
    """Every logit's gradient: `[T, E]`, or `[T, 2 E]` as a value and what its rounding left."""
    K: tl.constexpr = SIZES.K
    o_t = tl.program_id(0) * SIZES.BLOCK_T + tl.arange(0, SIZES.BLOCK_T)
    o_e = tl.arange(0, SIZES.BLOCK_E)
    o_k = tl.arange(0, SIZES.BLOCK_K)
    m_t = o_t < T
    o_tk = o_t[:, None] * K + o_k[None, :]
    m_tk = m_t[:, None] & (o_k < K)[None, :]
    b_sum = tl.full([SIZES.BLOCK_T], 1.0, tl.float32)
    b_dot = tl.zeros([SIZES.BLOCK_T], tl.float32)
    if SIZES.NORMALISE:
        # [BLOCK_T, BLOCK_K]
        b_dw = tl.load(dweights + o_tk, mask=m_tk, other=0.0)
        b_s = tl.load(scores + o_tk, mask=m_tk, other=0.0)
        b_sum = tl.sum(b_s, 1) + 1e-20
        b_dot = tl.sum(b_dw * (b_s / b_sum[:, None]), 1)
    b_dlogit = tl.zeros([SIZES.BLOCK_T, SIZES.BLOCK_E], tl.float32)
    for k in tl.static_range(K):
        # [BLOCK_T]
        b_dwk = tl.load(dweights + o_t * K + k, mask=m_t, other=0.0)
        b_sk = tl.load(scores + o_t * K + k, mask=m_t, other=0.0)
        b_ek = tl.load(indices + o_t * K + k, mask=m_t, other=0).to(tl.int32)
        b_d = factor / b_sum * (b_dwk - b_dot) * b_sk * (1.0 - b_sk)
        b_dlogit += tl.where(o_e[None, :] == b_ek[:, None], b_d[:, None], 0.0)
    m_te = m_t[:, None] & (o_e < SIZES.E)[None, :]
    if SPLIT:
        p_d = dlogits + o_t[:, None].to(tl.int64) * (2 * SIZES.E) + o_e[None, :]
        b_high = b_dlogit.to(dlogits.dtype.element_ty)
        tl.store(p_d, b_high, mask=m_te)
        b_low = b_dlogit - b_high.to(tl.float32)
        tl.store(p_d + SIZES.E, b_low.to(dlogits.dtype.element_ty), mask=m_te)
    else:
        tl.store(dlogits + o_t[:, None].to(tl.int64) * SIZES.E + o_e[None, :], b_dlogit, mask=m_te)
