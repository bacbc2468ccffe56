"""Causal depthwise convolution in Triton: one pass over memory each way (README.md).

Letters: T packed tokens, n_docs documents, C channels, W taps. Tap k here is counted backwards from
the current token: it meets `x_{t-k}` and is `weight[:, W-1-k]`. `position` is a token's place in
its own document, so a tap reaches a token of the document where `position >= k`, and its initial
state where not.
"""

import triton
import triton.language as tl

from nemotron_v3.ops.common.jit import kernel


@triton.jit
def _when(condition, mask):
    """`mask` where a scalar condition holds (`&` of a scalar and a block is no bool in Triton)."""
    return tl.where(condition, mask, False)


@kernel
def causal_conv1d_fwd_kernel(
    x,
    weight,
    bias,
    initial_states,
    y,
    final_states,
    position,
    seq_idx,
    cu_seqlens,
    T,
    C,
    tiles,
    STRIDES: tl.constexpr,
    SIZES: tl.constexpr,
):
    """The first `tiles` rows of programs compute y; the rest copy a document's last inputs."""
    W: tl.constexpr = SIZES.W
    n_c = tl.cdiv(C, SIZES.BLOCK_C)
    i_c = (tl.program_id(0) % n_c) * SIZES.BLOCK_C
    i_t = tl.program_id(0) // n_c
    o_c = i_c + tl.arange(0, SIZES.BLOCK_C)
    m_c = o_c < C
    if i_t < tiles:
        first = i_t.to(tl.int64) * SIZES.BLOCK_T
        o_t = tl.arange(0, SIZES.BLOCK_T)
        m_t = first + o_t < T
        # [BLOCK_T]
        b_p = tl.load(position + first + o_t, mask=m_t, other=0)
        b_y = tl.zeros([tl.constexpr(SIZES.BLOCK_T), tl.constexpr(SIZES.BLOCK_C)], tl.float32)
        if initial_states is not None:
            b_d = tl.load(seq_idx + first + o_t, mask=m_t, other=0).to(tl.int64)
        for k in tl.static_range(W):
            m_x = (m_t & (b_p >= k))[:, None] & m_c[None, :]
            # [BLOCK_T, BLOCK_C]
            p_x = x + (first - k) * STRIDES.x + o_t[:, None] * STRIDES.x + o_c[None, :]
            b_x = tl.load(p_x, mask=m_x, other=0.0).to(tl.float32)
            if initial_states is not None:
                m_s = (m_t & (b_p < k))[:, None] & m_c[None, :]
                p_s = (
                    initial_states + (b_d[:, None] * C + o_c[None, :]) * W + (W + b_p - k)[:, None]
                )
                b_x += tl.load(p_s, mask=m_s, other=0.0).to(tl.float32)
            # [BLOCK_C]
            b_w = tl.load(weight + o_c * W + (W - 1 - k), mask=m_c, other=0.0).to(tl.float32)
            b_y += b_x * b_w[None, :]
        if bias is not None:
            b_y += tl.load(bias + o_c, mask=m_c, other=0.0).to(tl.float32)[None, :]
        if SIZES.SILU:
            if x.dtype.element_ty == tl.float32:
                b_y *= _sigmoid(b_y, False)
            else:  # fewer registers than with a reciprocal root, and memory is what it waits for
                b_y = b_y / (1.0 + tl.exp(-b_y))
        p_y = y + first * C + o_t[:, None] * C + o_c[None, :]
        tl.store(p_y, b_y.to(y.dtype.element_ty), mask=m_t[:, None] & m_c[None, :])
    else:
        d = (i_t - tiles).to(tl.int64)
        start = tl.load(cu_seqlens + d)
        length = tl.load(cu_seqlens + d + 1) - start
        o_w = tl.arange(0, SIZES.BLOCK_W)
        m_last = m_c[:, None] & (o_w < W)[None, :]
        o_p = length - W + o_w  # [BLOCK_W], positions in the document, negative before it
        # [BLOCK_C, BLOCK_W]
        p_last = x + start * STRIDES.x + o_p[None, :] * STRIDES.x + o_c[:, None]
        b_last = tl.load(p_last, mask=m_last & (o_p >= 0)[None, :], other=0.0)
        if initial_states is not None:
            p_old = initial_states + (d * C + o_c[:, None]) * W + (W + o_p)[None, :]
            b_last += tl.load(p_old, mask=m_last & (o_p < 0)[None, :], other=0.0)
        tl.store(final_states + (d * C + o_c[:, None]) * W + o_w[None, :], b_last, mask=m_last)


@triton.jit
def _sigmoid(b_x, FAST: tl.constexpr):
    if FAST:  # a division is eight instructions, a reciprocal root one; a few ulps
        b_s = tl.rsqrt(1.0 + tl.exp2(b_x * -1.4426950408889634))
        return b_s * b_s
    # exp(-x) as 2^n 2^r, since the rounding of x log2(e) alone is an error of x ulps
    b_x = tl.minimum(tl.maximum(b_x, -100.0), 100.0)
    n = tl.floor(b_x * -1.4426950408889634 + 0.5)
    r = (b_x * -1.4423828125 - n) - b_x * 0.000312228388963
    return tl.div_rn(b_x * 0.0 + 1.0, 1.0 + tl.exp2(r) * tl.exp2(n))


@triton.jit
def _d_preactivation(b_dy, b_pre, SILU: tl.constexpr, FAST: tl.constexpr):
    if SILU:
        b_s = _sigmoid(b_pre, FAST)
        return b_dy * (b_s + b_pre * b_s * (1.0 - b_s))
    return b_dy


@triton.jit
def _row(b_x, b_dy, taps, b_bias, before, due, b_dw, b_db, W: tl.constexpr, SILU, FAST):
    """A token of the backward whose taps all lie in its document, and in the segment's own rows.

    Returns dx of the token W - 1 before it, and `before`, `due`, `b_dw`, `b_db` after it.
    """
    inputs = (b_x,) + before
    b_pre = b_bias
    for k in tl.static_range(W):
        b_pre += taps[k] * inputs[k]
    b_dpre = _d_preactivation(b_dy, b_pre, SILU, FAST)
    sums = ()
    later = (taps[0] * b_dpre,)
    for k in tl.static_range(W):
        sums = sums + (b_dw[k] + b_dpre * inputs[k],)
        if k > 0:
            later = later + (due[k - 1] + taps[k] * b_dpre,)
    return later[W - 1], inputs[: W - 1], later[: W - 1], sums, b_db + b_dpre


@kernel
def causal_conv1d_bwd_kernel(
    dy,
    x,
    weight,
    bias,
    initial_states,
    dfinal_states,
    dx,
    partial,
    position,
    seq_idx,
    cu_seqlens,
    T,
    C,
    STRIDES: tl.constexpr,
    SIZES: tl.constexpr,
):
    """A program walks SEGMENT tokens of its channels, and W - 1 more for the taps that reach back.

    `before` holds x of the last W - 1 tokens; `due` the sums of their dx that later taps still add
    to. UNROLL rows are loaded before the first of them is stored: a load cannot pass a store. Most
    rows lie in the middle of a document and of the segment: those need no masks, which are half of
    the other rows' instructions.
    """
    W: tl.constexpr = SIZES.W
    n_c = tl.cdiv(C, SIZES.BLOCK_C)
    o_c = (tl.program_id(0) % n_c) * SIZES.BLOCK_C + tl.arange(0, SIZES.BLOCK_C)
    m_c = o_c < C
    i_s = tl.program_id(0) // n_c
    FAST: tl.constexpr = x.dtype.element_ty != tl.float32
    first = i_s.to(tl.int64) * SIZES.SEGMENT
    own = first + SIZES.SEGMENT
    reach = own + (W - 1)

    b_zero = tl.zeros([tl.constexpr(SIZES.BLOCK_C)], tl.float32)
    b_bias = b_zero
    if bias is not None:
        b_bias = tl.load(bias + o_c, mask=m_c, other=0.0).to(tl.float32)
    taps = ()
    before = ()
    for k in tl.static_range(W):
        b_w = tl.load(weight + o_c * W + (W - 1 - k), mask=m_c, other=0.0)
        taps = taps + (b_w.to(tl.float32),)
        if k > 0:
            b_b = tl.load(x + (first - k) * STRIDES.x + o_c, mask=_when(first >= k, m_c), other=0.0)
            before = before + (b_b.to(tl.float32),)
    due = (b_zero,) * (W - 1)
    b_dw = (b_zero,) * W
    b_db = b_zero

    for i_u in range(0, SIZES.SEGMENT + W - 1, SIZES.UNROLL):
        last = first + i_u + (SIZES.UNROLL - 1)
        plain = (i_u > 0) & (last < own) & (last < T) & (dfinal_states is None)
        p_last = tl.load(position + last, mask=plain, other=0)
        if plain & (p_last >= SIZES.UNROLL + W - 2):
            rows_x = ()
            rows_dy = ()
            for u in tl.static_range(tl.constexpr(SIZES.UNROLL)):
                t = first + i_u + u
                # [BLOCK_C]
                rows_x = rows_x + (tl.load(x + t * STRIDES.x + o_c, mask=m_c, other=0.0),)
                rows_dy = rows_dy + (tl.load(dy + t * STRIDES.dy + o_c, mask=m_c, other=0.0),)
            for u in tl.static_range(tl.constexpr(SIZES.UNROLL)):
                b_dx, before, due, b_dw, b_db = _row(
                    *(rows_x[u].to(tl.float32), rows_dy[u].to(tl.float32), taps, b_bias),
                    *(before, due, b_dw, b_db, W, SIZES.SILU, FAST),
                )
                p_dx = dx + (first + i_u + u - (W - 1)) * STRIDES.dx + o_c
                tl.store(p_dx, b_dx.to(dx.dtype.element_ty), mask=m_c)
        else:
            rows_x = ()
            rows_dy = ()
            places = ()
            for u in tl.static_range(tl.constexpr(SIZES.UNROLL)):
                t = first + i_u + u
                inside = (t < T) & (t < reach)
                # [BLOCK_C]
                b_x = tl.load(x + t * STRIDES.x + o_c, mask=_when(inside, m_c), other=0.0)
                b_dy = tl.load(dy + t * STRIDES.dy + o_c, mask=_when(inside, m_c), other=0.0)
                rows_x = rows_x + (b_x,)
                rows_dy = rows_dy + (b_dy,)
                places = places + (tl.load(position + t, mask=inside, other=0),)
            for u in tl.static_range(tl.constexpr(SIZES.UNROLL)):
                t = first + i_u + u
                p = places[u]
                inputs = (rows_x[u].to(tl.float32),)
                if initial_states is not None:
                    d = tl.load(seq_idx + t, mask=t < T, other=0).to(tl.int64)
                for k in tl.static_range(1, W):
                    b_in = tl.where(p >= k, before[k - 1], 0.0)
                    if initial_states is not None:
                        p_s = initial_states + (d * C + o_c) * W + (W + p - k)
                        b_s = tl.load(p_s, mask=_when((p < k) & (t < T), m_c), other=0.0)
                        b_in += b_s.to(tl.float32)
                    inputs = inputs + (b_in,)
                b_pre = b_bias
                for k in tl.static_range(W):
                    b_pre += taps[k] * inputs[k]
                b_dpre = _d_preactivation(rows_dy[u].to(tl.float32), b_pre, SIZES.SILU, FAST)
                # The taps that reach back belong to this segment, the sums over tokens to the next.
                b_own = tl.where(t < own, b_dpre, 0.0)
                b_db += b_own
                sums = ()
                later = (taps[0] * b_dpre,)
                for k in tl.static_range(W):
                    sums = sums + (b_dw[k] + b_own * inputs[k],)
                    if k > 0:
                        later = later + (due[k - 1] + tl.where(p >= k, taps[k] * b_dpre, 0.0),)
                b_dw = sums
                due = later[: W - 1]
                before = (rows_x[u].to(tl.float32),) + before[: W - 2]

                b_dx = later[W - 1]
                done = t - (W - 1)
                m_done = (done >= first) & (done < own) & (done < T)
                if dfinal_states is not None:
                    d_done = tl.load(seq_idx + done, mask=m_done, other=0).to(tl.int64)
                    left = tl.load(cu_seqlens + d_done + 1) - done
                    p_f = dfinal_states + (d_done * C + o_c) * W + (W - left)
                    b_dx += tl.load(p_f, mask=_when(m_done & (left <= W), m_c), other=0.0).to(
                        tl.float32
                    )
                p_dx = dx + done * STRIDES.dx + o_c
                tl.store(p_dx, b_dx.to(dx.dtype.element_ty), mask=_when(m_done, m_c))

    p_sum = partial + i_s.to(tl.int64) * (W + 1) * C + o_c
    for k in tl.static_range(W):
        tl.store(p_sum + (W - 1 - k) * C, b_dw[k], mask=m_c)
    tl.store(p_sum + W * C, b_db, mask=m_c)


@kernel
def initial_states_bwd_kernel(
    dy,
    x,
    weight,
    bias,
    initial_states,
    dfinal_states,
    dinitial_states,
    cu_seqlens,
    C,
    STRIDES: tl.constexpr,
    SIZES: tl.constexpr,
):
    """d(initial state): only the first W - 1 tokens of a document reach back to it."""
    W: tl.constexpr = SIZES.W
    n_c = tl.cdiv(C, SIZES.BLOCK_C)
    o_c = (tl.program_id(0) % n_c) * SIZES.BLOCK_C + tl.arange(0, SIZES.BLOCK_C)
    m_c = o_c < C
    d = (tl.program_id(0) // n_c).to(tl.int64)
    FAST: tl.constexpr = x.dtype.element_ty != tl.float32
    start = tl.load(cu_seqlens + d)
    length = tl.load(cu_seqlens + d + 1) - start
    b_bias = tl.zeros([tl.constexpr(SIZES.BLOCK_C)], tl.float32)
    if bias is not None:
        b_bias = tl.load(bias + o_c, mask=m_c, other=0.0).to(tl.float32)
    taps = ()
    inputs = ()  # those of the state, then the document's own
    for k in tl.static_range(W):
        b_w = tl.load(weight + o_c * W + (W - 1 - k), mask=m_c, other=0.0)
        taps = taps + (b_w.to(tl.float32),)
        b_x = tl.load(initial_states + (d * C + o_c) * W + k, mask=m_c, other=0.0)
        inputs = inputs + (b_x.to(tl.float32),)
    dpres = ()
    for p in tl.static_range(W - 1):
        m_p = _when(p < length, m_c)
        b_x = tl.load(x + (start + p) * STRIDES.x + o_c, mask=m_p, other=0.0)
        inputs = inputs + (b_x.to(tl.float32),)
        b_pre = b_bias
        for k in tl.static_range(W):
            b_pre += taps[k] * inputs[W + p - k]
        b_dy = tl.load(dy + (start + p) * STRIDES.dy + o_c, mask=m_p, other=0.0)
        b_dpre = _d_preactivation(b_dy.to(tl.float32), b_pre, SIZES.SILU, FAST)
        dpres = dpres + (b_dpre,)
    for i in tl.static_range(W):
        b_sum = tl.zeros([tl.constexpr(SIZES.BLOCK_C)], tl.float32)
        for p in tl.static_range(i):  # entry i is W - i tokens before the document
            b_sum += taps[W + p - i] * dpres[p]
        if (
            dfinal_states is not None
        ):  # what a short document leaves of its initial state is in its final one
            p_f = dfinal_states + (d * C + o_c) * W + (i - length)
            b_sum += tl.load(p_f, mask=_when(i >= length, m_c), other=0.0).to(tl.float32)
        p_d = dinitial_states + (d * C + o_c) * W + i
        tl.store(p_d, b_sum.to(dinitial_states.dtype.element_ty), mask=m_c)
