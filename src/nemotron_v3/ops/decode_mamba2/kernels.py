"""One token of a Mamba-2 mixer for the slots of a batch in Triton (README.md).

Letters: R slots, H heads, P head width, G groups, N state, W conv taps, C convolved channels; I =
H P.
"""

import math
from typing import NamedTuple

import triton
import triton.language as tl
from torch import Tensor

from nemotron_v3.ops._jit import kernel
from nemotron_v3.ops._launch import Launcher
from nemotron_v3.ops._triton import interpreted, on_device_of_first, power_of_two, unit_stride
from nemotron_v3.ops.ssd.kernels.steps import softplus


@triton.jit
def _silu(b_u):
    """`u / (1 + exp(-u))` without losing digits of the exponential where |u| is large."""
    b_v = tl.minimum(tl.abs(b_u), 100.0)
    b_n = tl.floor(b_v * -1.4426950408889634 + 0.5)
    b_r = (b_v * -1.4423828125 - b_n) - b_v * 0.000312228388963  # log2(e) in two parts
    b_e = tl.exp2(b_r) * tl.exp2(b_n)  # exp(-|u|)
    b_s = tl.div_rn(tl.where(b_u < 0, b_e, 1.0), 1.0 + b_e)
    return b_u * b_s


@triton.jit
def _convolve(
    b_new,
    p_ring,
    conv_weight,
    conv_bias,
    place,
    o_c,
    m_c,
    C: tl.constexpr,
    W: tl.constexpr,
    BIASED: tl.constexpr,
    KIND: tl.constexpr,
):
    """Channels `o_c` of a row, convolved, rounded to KIND as where they pass through memory.

    `b_new` are their newest inputs as the ring keeps them, not yet in it.
    """
    p_w = conv_weight + o_c * W
    b_u = b_new.to(tl.float32) * tl.load(p_w + W - 1, mask=m_c, other=0.0).to(tl.float32)
    for k in tl.static_range(1, W):
        # The input k tokens ago; the place of the W-th, the newest one's, is not read.
        b_old = tl.load(p_ring + (place + W - k) % W * C + o_c, mask=m_c, other=0.0)
        b_w = tl.load(p_w + W - 1 - k, mask=m_c, other=0.0)
        b_u += b_old.to(tl.float32) * b_w.to(tl.float32)
    if BIASED:
        b_u += tl.load(conv_bias + o_c, mask=m_c, other=0.0).to(tl.float32)
    return _silu(b_u).to(KIND).to(tl.float32)


@kernel
def step_kernel(
    projected,
    conv,
    ssm,
    positions,
    active,
    conv_weight,
    conv_bias,
    dt_bias,
    A_log,
    D,
    out,
    low,
    high,
    stride: tl.constexpr,
    H: tl.constexpr,
    P: tl.constexpr,
    G: tl.constexpr,
    N: tl.constexpr,
    W: tl.constexpr,
    BLOCK_P: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BIASED: tl.constexpr,
):
    """A program has BLOCK_P rows of one head's state in one slot.

    Each convolves the B and C of its group again; the first of a group keeps their newest inputs.
    Of a ring nobody reads the place that is written, so the order of programs does not matter.
    """
    I: tl.constexpr = H * P  # noqa: E741
    C: tl.constexpr = I + 2 * G * N
    BLOCKS: tl.constexpr = (P + BLOCK_P - 1) // BLOCK_P
    i_p = tl.program_id(0) % BLOCKS
    i_h = tl.program_id(0) // BLOCKS % H
    i_r = (tl.program_id(0) // (BLOCKS * H)).to(tl.int64)
    i_g = i_h // (H // G)
    o_p = i_p * BLOCK_P + tl.arange(0, BLOCK_P)
    o_n = tl.arange(0, BLOCK_N)
    m_p, m_n = o_p < P, o_n < N
    p_out = out + i_r * I + i_h * P + o_p
    if tl.load(active + i_r) == 0:
        tl.store(p_out, tl.zeros([BLOCK_P], tl.float32), mask=m_p)
    else:
        # [BLOCK_P, BLOCK_N], before all else: it is what takes time
        m_S = m_p[:, None] & m_n[None, :]
        p_S = ssm + (i_r * I + i_h * P + o_p[:, None]) * N + o_n[None, :]
        b_S = tl.load(p_S, mask=m_S, other=0.0).to(tl.float32)
        place = (tl.load(positions + i_r) % W).to(tl.int32)
        p_row = projected + i_r * stride
        p_ring = conv + i_r * (W * C)
        o_x, o_B, o_C = i_h * P + o_p, I + i_g * N + o_n, I + (G + i_g) * N + o_n
        # [BLOCK_P], [BLOCK_N], [BLOCK_N]
        KEPT: tl.constexpr = conv.dtype.element_ty
        KIND: tl.constexpr = projected.dtype.element_ty
        b_x_new = tl.load(p_row + I + o_x, mask=m_p, other=0.0).to(KEPT)
        b_B_new = tl.load(p_row + I + o_B, mask=m_n, other=0.0).to(KEPT)
        b_C_new = tl.load(p_row + I + o_C, mask=m_n, other=0.0).to(KEPT)
        b_z = tl.load(p_row + o_x, mask=m_p, other=0.0).to(tl.float32)
        b_u = tl.load(p_row + I + C + i_h).to(tl.float32) + tl.load(dt_bias + i_h).to(tl.float32)
        b_A = -tl.exp(tl.load(A_log + i_h).to(tl.float32))
        b_skip = tl.load(D + i_h).to(tl.float32)
        b_x = _convolve(
            b_x_new, p_ring, conv_weight, conv_bias, place, o_x, m_p, C, W, BIASED, KIND
        )
        b_B = _convolve(
            b_B_new, p_ring, conv_weight, conv_bias, place, o_B, m_n, C, W, BIASED, KIND
        )
        b_C = _convolve(
            b_C_new, p_ring, conv_weight, conv_bias, place, o_C, m_n, C, W, BIASED, KIND
        )
        b_dt = tl.where(b_u == b_u, tl.minimum(tl.maximum(softplus(b_u), low), high), b_u)
        b_S = tl.exp(b_dt * b_A) * b_S + (b_dt * b_x)[:, None] * b_B[None, :]
        tl.store(p_S, b_S.to(ssm.dtype.element_ty), mask=m_S)
        b_y = tl.sum(b_S * b_C[None, :], 1) + b_skip * b_x
        tl.store(p_out, b_y * _silu(b_z), mask=m_p)
        p_place = p_ring + place * C
        tl.store(p_place + o_x, b_x_new, mask=m_p)
        if (i_p == 0) & (i_h % (H // G) == 0):
            tl.store(p_place + o_B, b_B_new, mask=m_n)
            tl.store(p_place + o_C, b_C_new, mask=m_n)


class Blocks(NamedTuple):
    """BLOCK_P rows of a state a program, and its warps."""

    p: int
    warps: int


def blocks(heads: int, P: int, N: int) -> Blocks:
    """How a state is cut for so many heads in all slots.

    A multiprocessor hides the memory's latency with 30 KB or so under way, in several programs so
    that the loads of some run beside the stores of others. Many heads fill the GPU whatever their
    programs are, and large ones convolve B and C less often; few are cut finer, so that every
    multiprocessor has some.
    """
    most = 8192 if heads >= 1024 else 2048  # elements of a state
    block_n = power_of_two(N)
    p = min(power_of_two(P), max(1, most // block_n))
    if interpreted():
        return Blocks(power_of_two(P), 1)
    return Blocks(p, max(1, min(8, p * block_n // 1024)))


_launch = Launcher(step_kernel)


@on_device_of_first
def _step(projected: Tensor, tensors: tuple, numbers: tuple, constants: tuple, cut: Blocks) -> None:
    R, H, P, _ = tensors[1].shape
    _launch(R * H * -(-P // cut.p), (projected, *tensors), numbers, constants, cut.warps)


def decode_mamba2(
    projected: Tensor,
    conv: Tensor,
    ssm: Tensor,
    positions: Tensor,
    active: Tensor,
    *,
    conv_weight: Tensor,
    conv_bias: Tensor | None,
    dt_bias: Tensor,
    A_log: Tensor,
    D: Tensor,
    n_groups: int,
    dt_limit: tuple[float, float] = (0.0, math.inf),
    out: Tensor,
    cut: Blocks | None = None,
) -> Tensor:
    """See `ops.decode_mamba2`.

    Args:
        cut: how the state is cut; `blocks` chooses by default.
    """
    R, H, P, N = ssm.shape
    W = conv.shape[1]
    if R == 0:
        return out
    cut = blocks(R * H, P, N) if cut is None else cut
    projected = unit_stride(projected)
    of_heads = (t.contiguous() for t in (dt_bias, A_log, D))
    bias = None if conv_bias is None else conv_bias.contiguous()
    _step(
        projected,
        (conv, ssm, positions, active, conv_weight.contiguous(), bias, *of_heads, out),
        tuple(map(float, dt_limit)),
        (projected.stride(0), H, P, n_groups, N, W, cut.p, power_of_two(N), bias is not None),
        cut,
    )
    return out
