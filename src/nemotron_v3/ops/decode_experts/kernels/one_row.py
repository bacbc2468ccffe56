"""The experts' products of one row (README.md): its choices need no order, and no sum waits.

Letters: K choices, E experts, F expert width, X width the experts see, D hidden size.
"""

import triton.language as tl

from nemotron_v3.ops.common.early import start_early
from nemotron_v3.ops.common.jit import kernel
from nemotron_v3.ops.skinny_linear.kernels.tiles import low_rank_vector, weight_times_vector


@kernel
def up_kernel(
    x,
    shared_x,
    up,
    shared_up,
    weights,
    experts,
    h,
    shared_h,
    up_b,
    shared_b,
    thin,
    shared_thin,
    X,
    D,
    F_SHARED,
    rank,
    shared_rank,
    shared_blocks,
    F: tl.constexpr,
    RANK: tl.constexpr,
    SHARED_RANK: tl.constexpr,
    BLOCKS: tl.constexpr,
    PDL: tl.constexpr,
):
    """`h = weight relu(up x)^2` of every choice, and `relu(up x)^2` of the shared expert."""
    start_early(PDL)
    block = tl.program_id(0)
    if block < shared_blocks:
        o_m = block * BLOCKS.m + tl.arange(0, BLOCKS.m)
        m_m = o_m < F_SHARED
        p_w = shared_up + o_m.to(tl.int64) * D
        b_u = weight_times_vector(p_w, shared_x, shared_x, m_m, D, 0.0, False, 0, BLOCKS)
        if SHARED_RANK > 0:
            p_shared_b = shared_b + o_m * shared_rank
            b_u += low_rank_vector(p_shared_b, shared_thin, m_m, shared_rank, SHARED_RANK)
        b_u = tl.maximum(b_u.to(shared_h.dtype.element_ty).to(tl.float32), 0.0)
        tl.store(shared_h + o_m, (b_u * b_u).to(shared_h.dtype.element_ty), mask=m_m)
    else:
        blocks: tl.constexpr = (F + BLOCKS.m - 1) // BLOCKS.m
        choice = (block - shared_blocks) // blocks
        expert, weight = tl.load(experts + choice), tl.load(weights + choice)
        o_m = ((block - shared_blocks) % blocks) * BLOCKS.m + tl.arange(0, BLOCKS.m)
        m_m = o_m < F
        p_w = up + tl.maximum(expert, 0).to(tl.int64) * F * X + o_m.to(tl.int64) * X
        b_u = weight_times_vector(p_w, x, x, m_m, X, 0.0, False, 0, BLOCKS)
        if RANK > 0:
            p_b = up_b + tl.maximum(expert, 0).to(tl.int64) * F * rank + o_m * rank
            b_u += low_rank_vector(p_b, thin + choice * rank, m_m, rank, RANK)
        b_u = tl.maximum(b_u, 0.0)
        b_h = (b_u * b_u * weight).to(h.dtype.element_ty)
        tl.store(h + choice * F + o_m, b_h, mask=m_m)


@kernel
def down_kernel(
    h,
    shared_h,
    down,
    shared_down,
    experts,
    residual,
    out,
    down_b,
    shared_b,
    thin,
    shared_thin,
    X,
    F_SHARED,
    rank,
    shared_rank,
    F: tl.constexpr,
    K: tl.constexpr,
    ROUTED: tl.constexpr,
    SHARED: tl.constexpr,
    RESIDUAL: tl.constexpr,
    RANK: tl.constexpr,
    SHARED_RANK: tl.constexpr,
    BLOCKS: tl.constexpr,
    PDL: tl.constexpr,
):
    """A block of the result: the choices one after the other, the shared expert, the stream."""
    start_early(PDL)
    o_m = tl.program_id(0) * BLOCKS.m + tl.arange(0, BLOCKS.m)
    o_n = tl.arange(0, BLOCKS.n)
    m_m = o_m < X
    b_y = tl.zeros([tl.constexpr(BLOCKS.m)], tl.float32)
    if ROUTED:
        blocks: tl.constexpr = (F + BLOCKS.n - 1) // BLOCKS.n
        b_sum = tl.zeros([tl.constexpr(BLOCKS.m), tl.constexpr(BLOCKS.n)], tl.float32)
        for j in tl.range(0, K * blocks, num_stages=BLOCKS.stages):
            choice = j // blocks
            o_f = (j % blocks) * BLOCKS.n + o_n
            m_f = o_f < F
            expert = tl.maximum(tl.load(experts + choice), 0).to(tl.int64)
            p_w = down + expert * X * F + o_m[:, None].to(tl.int64) * F + o_f[None, :]
            b_w = tl.load(p_w, mask=m_m[:, None] & m_f[None, :], other=0.0)
            b_h = tl.load(h + choice * F + o_f, mask=m_f, other=0.0).to(tl.float32)
            b_sum += b_w.to(tl.float32) * b_h[None, :]
        b_y += tl.sum(b_sum, 1)
        if RANK > 0:
            for k in tl.static_range(K):
                expert = tl.maximum(tl.load(experts + k), 0).to(tl.int64)
                p_b = down_b + expert * X * rank + o_m * rank
                b_y += low_rank_vector(p_b, thin + k * rank, m_m, rank, RANK)
    if SHARED:
        p_w = shared_down + o_m.to(tl.int64) * F_SHARED
        b_y += weight_times_vector(p_w, shared_h, shared_h, m_m, F_SHARED, 0.0, False, 0, BLOCKS)
        if SHARED_RANK > 0:
            p_shared_b = shared_b + o_m * shared_rank
            b_y += low_rank_vector(p_shared_b, shared_thin, m_m, shared_rank, SHARED_RANK)
    if RESIDUAL:
        b_y += tl.load(residual + o_m, mask=m_m, other=0.0).to(tl.float32)
    tl.store(out + o_m, b_y.to(out.dtype.element_ty), mask=m_m)
