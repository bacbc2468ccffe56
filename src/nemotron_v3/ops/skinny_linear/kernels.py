"""Projections of a few rows in Triton (README.md).

Letters: R rows, m outputs, n inputs, G groups of a norm.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from nemotron_v3.ops.common.early import early, start_early
from nemotron_v3.ops.common.host import power_of_two
from nemotron_v3.ops.skinny_linear.norm import Norm
from nemotron_v3.ops.skinny_linear.tiles import (
    multiply,
    weight_times_rows,
    weight_times_vector,
)


@triton.jit
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
    R,
    n,
    m_0,
    m_1,
    m_2,
    blocks_0,
    blocks_1,
    eps,
    stride_x,
    stride_out,
    NORM: tl.constexpr,
    GROUP: tl.constexpr,
    BIAS: tl.constexpr,
    RESIDUAL: tl.constexpr,
    PARTS: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_R: tl.constexpr,
    EVEN: tl.constexpr,
    STAGES: tl.constexpr,
    PDL: tl.constexpr,
):
    """One block of outputs of up to three weights side by side, for BLOCK_R rows; a BLOCK_R of 1
    takes no tensor core."""
    start_early(PDL)
    block = tl.program_id(0)
    o_r = tl.program_id(1) * BLOCK_R + tl.arange(0, BLOCK_R)
    m_r = o_r < R
    weight, bias, m, first = w_0, bias_0, m_0, 0
    if PARTS > 1 and block >= blocks_0:
        block -= blocks_0
        weight, bias, m, first = w_1, bias_1, m_1, m_0
        if PARTS > 2 and block >= blocks_1:
            block -= blocks_1
            weight, bias, m, first = w_2, bias_2, m_2, m_0 + m_1
    o_m = block * BLOCK_M + tl.arange(0, BLOCK_M)
    m_m = o_m < m
    p_w = weight + o_m.to(tl.int64) * n
    p_x = x + o_r.to(tl.int64) * stride_x
    if BLOCK_R == 1:
        b_y = weight_times_vector(
            p_w, x, gain, m_m, n, eps, NORM, GROUP, BLOCK_M, BLOCK_N, STAGES
        )[:, None]
    elif NORM:
        b_y = _normalised(
            p_w, p_x, gain, m_m, m_r, n, eps, BLOCK_M, BLOCK_N, BLOCK_R, EVEN, STAGES
        )
    else:
        b_y = weight_times_rows(p_w, p_x, m_m, m_r, n, BLOCK_M, BLOCK_N, BLOCK_R, EVEN, STAGES)
    if BIAS:
        b_y += tl.load(bias + o_m, mask=m_m, other=0.0).to(tl.float32)[:, None]
    p_out = out + o_r[None, :].to(tl.int64) * stride_out + (first + o_m)[:, None]
    m_out = m_m[:, None] & m_r[None, :]
    if RESIDUAL:
        p_res = residual + o_r[None, :].to(tl.int64) * stride_out + (first + o_m)[:, None]
        b_y += tl.load(p_res, mask=m_out, other=0.0).to(tl.float32)
    tl.store(p_out, b_y.to(out.dtype.element_ty), mask=m_out)


@triton.jit
def _normalised(
    p_w,
    p_x,
    gain,
    m_m,
    m_r,
    n,
    eps,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_R: tl.constexpr,
    EVEN: tl.constexpr,
    STAGES: tl.constexpr,
):
    """`weight (gain x / rms(x))^T`: what divides a row is known behind its last input."""
    o_n = tl.arange(0, BLOCK_N)
    b_sum = tl.zeros([BLOCK_M, BLOCK_R], tl.float32)
    b_square = tl.zeros([BLOCK_R], tl.float32)
    for k in tl.range(0, n, BLOCK_N, num_stages=STAGES):
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


@triton.jit
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


def skinny_linear(
    x: Tensor,
    weights: tuple[Tensor, ...],
    biases: tuple[Tensor | None, ...],
    *,
    norm: Norm | None,
    residual: Tensor | None,
    out: Tensor,
) -> Tensor:
    R, n = x.shape
    sizes = [len(weight) for weight in weights]
    w = [*weights, *weights[:1] * (3 - len(weights))]
    b = [weight if bias is None else bias for weight, bias in zip(weights, biases, strict=True)]
    b += b[:1] * (3 - len(weights))
    m = [*sizes, 0, 0]
    block_m, block_n, block_r, warps, stages = blocks_of(R, n, sum(sizes), weights[0].dtype)
    group = 0 if norm is None or norm.group in (0, n) else norm.group
    if group and block_r == 1 and power_of_two(group) == group <= 1024:
        block_n = group
    elif group:
        x, norm, group = _by_group(x, norm, weights[0].dtype), None, 0
    blocks = [triton.cdiv(size, block_m) for size in sizes]
    linear_kernel[sum(blocks), triton.cdiv(R, block_r)](
        x,
        *w,
        *b,
        gain=None if norm is None else norm.weight,
        residual=residual,
        out=out,
        R=R,
        n=n,
        m_0=m[0],
        m_1=m[1],
        m_2=m[2],
        blocks_0=blocks[0],
        blocks_1=blocks[1] if len(blocks) > 1 else 0,
        eps=0.0 if norm is None else norm.eps,
        stride_x=x.stride(0),
        stride_out=out.stride(0),
        NORM=norm is not None,
        GROUP=group,
        BIAS=biases[0] is not None,
        RESIDUAL=residual is not None,
        PARTS=len(weights),
        BLOCK_M=block_m,
        BLOCK_N=block_n,
        BLOCK_R=block_r,
        EVEN=n % block_n == 0,
        STAGES=stages,
        num_warps=warps,
        **early(x.device),
    )
    return out


def _by_group(x: Tensor, norm: Norm, dtype: torch.dtype) -> Tensor:
    R, n = x.shape
    out = torch.empty(R, n, dtype=dtype, device=x.device)
    group_norm_kernel[R, n // norm.group](
        x,
        norm.weight,
        out,
        norm.eps,
        x.stride(0),
        n,
        SIZE=norm.group,
        BLOCK=power_of_two(norm.group),
        num_warps=4,
        **early(x.device),
    )
    return out


def blocks_of(R: int, n: int, m: int, dtype: torch.dtype) -> tuple[int, int, int, int, int]:
    """BLOCK_M, BLOCK_N, BLOCK_R, warps and stages; measured on an H200 (docs/log.md).

    What counts is how many bytes of the weight are on their way at a time: 32 KB a multiprocessor
    at least. Norms and rows are read once a program, so large weights have large blocks.
    """
    if dtype == torch.float32:
        return (8, 256, 1, 4, 3) if R == 1 else (32, 32, min(max(power_of_two(R), 16), 32), 4, 2)
    if R == 1:
        return (16, 256, 1, 4, 4) if m >= 4096 else (8, 512, 1, 4, 4)
    if R <= 16:
        return (128, 128, 16, 8, 5) if m >= 8192 else (64, 256, 16, 4, 4)
    if R <= 32:
        return (128, 128, 32, 8, 4) if m >= 8192 else (64, 128, 32, 4, 5)
    return (64, 64, 64, 4, 4) if R <= 64 else (64, 64, 128, 8, 3)
