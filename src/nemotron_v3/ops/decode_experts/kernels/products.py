"""The experts' products in a decode step (README.md).

Letters: R rows, K choices a row, E experts, F expert width, X width the experts see, D hidden size.
"""

import triton.language as tl

from nemotron_v3.ops.common.early import start_early
from nemotron_v3.ops.common.jit import kernel
from nemotron_v3.ops.skinny_linear.kernels.tiles import low_rank_rows, weight_times_rows


@kernel
def up_kernel(
    x,
    shared_x,
    up,
    shared_up,
    weights,
    slots,
    choices,
    h,
    shared_h,
    up_b,
    shared_b,
    thin,
    shared_thin,
    R,
    X,
    D,
    F_SHARED,
    rank,
    shared_rank,
    shared_blocks,
    F: tl.constexpr,
    K: tl.constexpr,
    SLOTS: tl.constexpr,
    RANK: tl.constexpr,
    SHARED_RANK: tl.constexpr,
    BLOCKS: tl.constexpr,
    SHARED_BLOCKS: tl.constexpr,
    EVEN_X: tl.constexpr,
    EVEN_D: tl.constexpr,
    PDL: tl.constexpr,
):
    """`h = weight relu(up x)^2` of every choice, and `relu(up x)^2` of the shared expert.

    An expert's weights are read once for a block of its rows. BLOCKS and SHARED_BLOCKS are
    `launch.Blocks` of an expert that is routed to and of the shared one; they differ in their rows.
    """
    start_early(PDL)
    block = tl.program_id(0)
    if block < shared_blocks:
        o_m = block * BLOCKS.m + tl.arange(0, BLOCKS.m)
        m_m = o_m < F_SHARED
        p_w = shared_up + o_m.to(tl.int64) * D
        for r in range(0, R, SHARED_BLOCKS.r):
            o_r = r + tl.arange(0, SHARED_BLOCKS.r)
            m_r = o_r < R
            p_x = shared_x + o_r.to(tl.int64) * D
            b_u = weight_times_rows(p_w, p_x, m_m, m_r, D, SHARED_BLOCKS, EVEN_D)
            if SHARED_RANK > 0:
                p_t = shared_thin + o_r.to(tl.int64) * shared_rank
                b_u += low_rank_rows(
                    shared_b + o_m * shared_rank, p_t, m_m, m_r, shared_rank, SHARED_RANK
                )
            b_u = tl.maximum(b_u.to(x.dtype.element_ty).to(tl.float32), 0.0)
            p_h = shared_h + o_r[None, :].to(tl.int64) * F_SHARED + o_m[:, None]
            b_h = (b_u * b_u).to(shared_h.dtype.element_ty)
            tl.store(p_h, b_h, mask=m_m[:, None] & m_r[None, :])
    else:
        blocks: tl.constexpr = (F + BLOCKS.m - 1) // BLOCKS.m
        slot = (block - shared_blocks) // blocks
        expert = tl.load(slots + slot)
        if expert >= 0:
            start, count = tl.load(slots + SLOTS + slot), tl.load(slots + 2 * SLOTS + slot)
            o_m = ((block - shared_blocks) % blocks) * BLOCKS.m + tl.arange(0, BLOCKS.m)
            m_m = o_m < F
            p_w = up + expert.to(tl.int64) * F * X + o_m.to(tl.int64) * X
            for r in range(0, count, BLOCKS.r):
                o_c = r + tl.arange(0, BLOCKS.r)
                m_c = o_c < count
                b_choice = tl.load(choices + start + o_c, mask=m_c, other=0)
                p_x = x + (b_choice // K).to(tl.int64) * X
                b_u = weight_times_rows(p_w, p_x, m_m, m_c, X, BLOCKS, EVEN_X)
                if RANK > 0:
                    p_b = up_b + expert.to(tl.int64) * F * rank + o_m * rank
                    b_u += low_rank_rows(p_b, thin + b_choice * rank, m_m, m_c, rank, RANK)
                b_u = tl.maximum(b_u, 0.0)
                b_weight = tl.load(weights + b_choice, mask=m_c, other=0.0)
                b_h = (b_u * b_u * b_weight[None, :]).to(h.dtype.element_ty)
                p_h = h + b_choice[None, :].to(tl.int64) * F + o_m[:, None]
                tl.store(p_h, b_h, mask=m_m[:, None] & m_c[None, :])


@kernel
def down_kernel(
    h,
    shared_h,
    down,
    shared_down,
    slots,
    choices,
    y,
    shared_y,
    down_b,
    shared_b,
    thin,
    shared_thin,
    R,
    X,
    D,
    F_SHARED,
    rank,
    shared_rank,
    shared_blocks,
    F: tl.constexpr,
    SLOTS: tl.constexpr,
    RANK: tl.constexpr,
    SHARED_RANK: tl.constexpr,
    BLOCKS: tl.constexpr,
    SHARED_BLOCKS: tl.constexpr,
    EVEN_F: tl.constexpr,
    EVEN_S: tl.constexpr,
    PDL: tl.constexpr,
):
    """`down h` of every choice, and of the shared expert."""
    start_early(PDL)
    block = tl.program_id(0)
    if block < shared_blocks:
        o_m = block * BLOCKS.m + tl.arange(0, BLOCKS.m)
        m_m = o_m < D
        p_w = shared_down + o_m.to(tl.int64) * F_SHARED
        for r in range(0, R, SHARED_BLOCKS.r):
            o_r = r + tl.arange(0, SHARED_BLOCKS.r)
            m_r = o_r < R
            p_h = shared_h + o_r.to(tl.int64) * F_SHARED
            b_y = weight_times_rows(p_w, p_h, m_m, m_r, F_SHARED, SHARED_BLOCKS, EVEN_S)
            if SHARED_RANK > 0:
                p_t = shared_thin + o_r.to(tl.int64) * shared_rank
                b_y += low_rank_rows(
                    shared_b + o_m * shared_rank, p_t, m_m, m_r, shared_rank, SHARED_RANK
                )
            p_y = shared_y + o_r[None, :].to(tl.int64) * D + o_m[:, None]
            tl.store(p_y, b_y.to(shared_y.dtype.element_ty), mask=m_m[:, None] & m_r[None, :])
    else:
        blocks = tl.cdiv(X, BLOCKS.m)
        slot = (block - shared_blocks) // blocks
        expert = tl.load(slots + slot)
        if expert >= 0:
            start, count = tl.load(slots + SLOTS + slot), tl.load(slots + 2 * SLOTS + slot)
            o_m = ((block - shared_blocks) % blocks) * BLOCKS.m + tl.arange(0, BLOCKS.m)
            m_m = o_m < X
            p_w = down + expert.to(tl.int64) * X * F + o_m.to(tl.int64) * F
            for r in range(0, count, BLOCKS.r):
                o_c = r + tl.arange(0, BLOCKS.r)
                m_c = o_c < count
                b_choice = tl.load(choices + start + o_c, mask=m_c, other=0)
                p_h = h + b_choice.to(tl.int64) * F
                b_y = weight_times_rows(p_w, p_h, m_m, m_c, F, BLOCKS, EVEN_F)
                if RANK > 0:
                    p_b = down_b + expert.to(tl.int64) * X * rank + o_m * rank
                    b_y += low_rank_rows(p_b, thin + b_choice * rank, m_m, m_c, rank, RANK)
                p_y = y + b_choice[None, :].to(tl.int64) * X + o_m[:, None]
                tl.store(p_y, b_y.to(y.dtype.element_ty), mask=m_m[:, None] & m_c[None, :])


@kernel
def combine_kernel(
    y,
    shared_y,
    residual,
    active,
    out,
    X,
    K: tl.constexpr,
    ROUTED: tl.constexpr,
    SHARED: tl.constexpr,
    RESIDUAL: tl.constexpr,
    BLOCK: tl.constexpr,
    PDL: tl.constexpr,
):
    """`out = sum over the choices, in their order, + shared + residual`; inactive rows stay."""
    start_early(PDL)
    r = tl.program_id(0)
    o_x = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    m_x = o_x < X
    if tl.load(active + r) != 0:
        b_sum = tl.zeros([BLOCK], tl.float32)
        if ROUTED:
            for k in tl.static_range(K):
                b_sum += tl.load(y + (r * K + k).to(tl.int64) * X + o_x, mask=m_x).to(tl.float32)
        if SHARED:
            b_sum += tl.load(shared_y + r.to(tl.int64) * X + o_x, mask=m_x).to(tl.float32)
        p_out = r.to(tl.int64) * X + o_x
        if RESIDUAL:
            b_sum += tl.load(residual + p_out, mask=m_x).to(tl.float32)
        tl.store(out + p_out, b_sum.to(out.dtype.element_ty), mask=m_x)
