"""The kernels of `skinny_linear` (README.md).

Letters: R rows, m outputs, n inputs.
"""

from typing import NamedTuple

import triton
import triton.language as tl

from nemotron_v3.ops.common.early import start_early
from nemotron_v3.ops.common.jit import kernel
from nemotron_v3.ops.skinny_linear.kernels.tiles import (
    low_rank_rows,
    low_rank_vector,
    multiply,
    weight_times_rows,
    weight_times_vector,
)


class Mode(NamedTuple):
    """What `linear_kernel` is compiled for, beside its `launch.Blocks`.

    Attributes:
        NORM: x is normalised and scaled by `gain`.
        GROUP: inputs that are normalised together; 0 is all.
        BIAS, RESIDUAL: whether each is added.
        PARTS: weights side by side.
        RANK: of the low-rank updates, filled up; 0 without them.
        EVEN: the inputs are a multiple of a block's.
    """

    NORM: bool
    GROUP: int
    BIAS: bool
    RESIDUAL: bool
    PARTS: int
    RANK: int
    EVEN: bool


@kernel
def linear_kernel(
    x,
    w_0,
    w_1,
    w_2,
    bias_0,
    bias_1,
    bias_2,
    gain,
    residual,
    out,
    b_0,
    b_1,
    b_2,
    thin,
    R,
    N,
    m_0,
    m_1,
    m_2,
    rank_0,
    rank_1,
    rank_2,
    blocks_0,
    blocks_1,
    eps,
    stride_x,
    stride_out,
    MODE: tl.constexpr,
    BLOCKS: tl.constexpr,
    PDL: tl.constexpr,
):
    """One block of outputs of up to three weights side by side, for a block of rows; one row takes
    no tensor core.

    `thin` holds what `thin_kernel` makes of low-rank updates.
    """
    start_early(PDL)
    block = tl.program_id(0)
    o_r = tl.program_id(1) * BLOCKS.r + tl.arange(0, BLOCKS.r)
    m_r = o_r < R
    weight, bias, m, first = w_0, bias_0, m_0, 0
    low, rank, t_first = b_0, rank_0, 0
    if MODE.PARTS > 1:  # noqa: SIM102 - a constant's and a tensor's
        if block >= blocks_0:
            block -= blocks_0
            weight, bias, m, first = w_1, bias_1, m_1, m_0
            low, rank, t_first = b_1, rank_1, rank_0
            if MODE.PARTS > 2:  # noqa: SIM102
                if block >= blocks_1:
                    block -= blocks_1
                    weight, bias, m, first = w_2, bias_2, m_2, m_0 + m_1
                    low, rank, t_first = b_2, rank_2, rank_0 + rank_1
    o_m = block * BLOCKS.m + tl.arange(0, BLOCKS.m)
    m_m = o_m < m
    p_w = weight + o_m.to(tl.int64) * N
    p_x = x + o_r.to(tl.int64) * stride_x
    if BLOCKS.r == 1:
        b_y = weight_times_vector(p_w, x, gain, m_m, N, eps, MODE.NORM, MODE.GROUP, BLOCKS)
        b_y = b_y[:, None]
    elif MODE.NORM:
        b_y = _normalised(p_w, p_x, gain, m_m, m_r, N, eps, BLOCKS, MODE.EVEN)
    else:
        b_y = weight_times_rows(p_w, p_x, m_m, m_r, N, BLOCKS, MODE.EVEN)
    if MODE.RANK > 0:
        p_b = low + o_m.to(tl.int64) * rank
        if BLOCKS.r == 1:
            b_y += low_rank_vector(p_b, thin + t_first, m_m, rank, MODE.RANK)[:, None]
        else:
            p_t = thin + o_r.to(tl.int64) * (rank_0 + rank_1 + rank_2) + t_first
            b_y += low_rank_rows(p_b, p_t, m_m, m_r, rank, MODE.RANK)
    if MODE.BIAS:
        b_y += tl.load(bias + o_m, mask=m_m, other=0.0).to(tl.float32)[:, None]
    p_out = out + o_r[None, :].to(tl.int64) * stride_out + (first + o_m)[:, None]
    m_out = m_m[:, None] & m_r[None, :]
    if MODE.RESIDUAL:
        p_res = residual + o_r[None, :].to(tl.int64) * stride_out + (first + o_m)[:, None]
        b_y += tl.load(p_res, mask=m_out, other=0.0).to(tl.float32)
    tl.store(p_out, b_y.to(out.dtype.element_ty), mask=m_out)


@triton.jit
def _normalised(p_w, p_x, gain, m_m, m_r, n, eps, BLOCKS: tl.constexpr, EVEN: tl.constexpr):
    """`weight (gain x / rms(x))^T`: what divides a row is known behind its last input."""
    o_n = tl.arange(0, BLOCKS.n)
    b_sum = tl.zeros([tl.constexpr(BLOCKS.m), tl.constexpr(BLOCKS.r)], tl.float32)
    b_square = tl.zeros([tl.constexpr(BLOCKS.r)], tl.float32)
    for k in tl.range(0, n, BLOCKS.n, num_stages=BLOCKS.stages):
        m_n = k + o_n < n
        m_w, m_x = m_m[:, None], m_r[None, :]
        if not EVEN:
            m_w, m_x = m_w & m_n[None, :], m_x & m_n[:, None]
        b_w = tl.load(p_w[:, None] + (k + o_n)[None, :], mask=m_w, other=0.0)
        b_x = tl.load(p_x[None, :] + (k + o_n)[:, None], mask=m_x, other=0.0).to(tl.float32)
        b_gain = tl.load(gain + k + o_n, mask=m_n, other=0.0).to(tl.float32)
        b_square += tl.sum(b_x * b_x, 0)
        b_sum += multiply(b_w, b_x * b_gain[:, None])
    return b_sum / tl.sqrt_rn(b_square / n + eps)[None, :]


@kernel
def group_norm_kernel(
    x,
    gain,
    out,
    eps,
    stride_x,
    stride_out,
    SIZE: tl.constexpr,
    BLOCK: tl.constexpr,
    PDL: tl.constexpr,
):
    """One group of a row; for many rows this costs less than to do it in every product."""
    start_early(PDL)
    r, o_n = tl.program_id(0).to(tl.int64), tl.arange(0, BLOCK)
    m_n, o_x = o_n < SIZE, tl.program_id(1) * SIZE + o_n
    b_x = tl.load(x + r * stride_x + o_x, mask=m_n, other=0.0).to(tl.float32)
    b_gain = tl.load(gain + o_x, mask=m_n, other=0.0).to(tl.float32)
    b_y = b_x / tl.sqrt_rn(tl.sum(b_x * b_x) / SIZE + eps) * b_gain
    tl.store(out + r * stride_out + o_x, b_y.to(out.dtype.element_ty), mask=m_n)
