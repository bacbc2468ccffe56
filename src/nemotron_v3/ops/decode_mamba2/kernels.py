"""One token of a Mamba-2 mixer for the slots of a batch in Triton (README.md).

Letters: R slots, H heads, P head width, G groups, N state, W conv taps, C convolved channels; I =
H P.
"""

import math
from typing import NamedTuple

import triton
import triton.language as tl
from torch import Tensor

from nemotron_v3.ops.common.early import early, start_early
from nemotron_v3.ops.common.host import interpreted, on_device_of_first, power_of_two, unit_stride
from nemotron_v3.ops.common.jit import kernel
from nemotron_v3.ops.ssd.kernels.chunk_cumsum import softplus


@triton.jit
def _silu(b_u, EXACT: tl.constexpr):
    """`u / (1 + exp(-u))`; EXACT loses no digits of the exponential where |u| is large."""
    if EXACT:
        b_v = tl.minimum(tl.abs(b_u), 100.0)
        b_n = tl.floor(b_v * -1.4426950408889634 + 0.5)
        b_r = (b_v * -1.4423828125 - b_n) - b_v * 0.000312228388963  # log2(e) in two parts
        b_e = tl.exp2(b_r) * tl.exp2(b_n)  # exp(-|u|)
        return b_u * tl.div_rn(tl.where(b_u < 0, b_e, 1.0), 1.0 + b_e)
    else:
        return b_u / (1.0 + tl.exp(-b_u))


@triton.jit
def _taps(
    p_new,
    p_ring,
    conv_weight,
    conv_bias,
    place,
    first,
    n,
    C: tl.constexpr,
    W: tl.constexpr,
    BLOCK: tl.constexpr,
    BLOCK_W: tl.constexpr,
    BIASED: tl.constexpr,
):
    """What the convolution sums for channels `first` to `first + n` of a row.

    `[BLOCK * BLOCK_W]`, in the weight's order. A vector of channels alone has fewer elements than
    the program has threads, and Triton would let each thread compute all that it later needs.
    """
    o_e = tl.arange(0, BLOCK * BLOCK_W)
    o_c, o_w = o_e // BLOCK_W, o_e % BLOCK_W
    m_c = o_c < n
    b_w = tl.load(conv_weight + (first + o_c) * W + o_w, mask=m_c & (o_w < W), other=0.0)
    # The newest input is not in the ring yet, and rounded as the ring keeps it.
    p_older = p_ring + (place + 1 + o_w) % W * C + first + o_c
    b_older = tl.load(p_older, mask=m_c & (o_w < W - 1), other=0.0)
    b_newest = tl.load(p_new + first + o_c, mask=m_c & (o_w == W - 1), other=0.0)
    b_u = b_older + b_newest.to(p_ring.dtype.element_ty)
    b_u = b_u.to(tl.float32) * b_w.to(tl.float32)
    if BIASED:
        b_bias = tl.load(conv_bias + first + o_c, mask=m_c & (o_w == 0), other=0.0)
        b_u += b_bias.to(tl.float32)
    return b_u


@triton.jit
def _convolved(
    b_taps, BLOCK: tl.constexpr, BLOCK_W: tl.constexpr, AS_COLUMN: tl.constexpr, KIND: tl.constexpr
):
    """The sum of a channel's taps, after SiLU, rounded as where it passes through memory."""
    b_taps = tl.reshape(b_taps, [BLOCK, BLOCK_W])
    # Summed along the other dimension than the one it is broadcast along: Triton would lay out the
    # whole state as the sum is.
    b_u = tl.sum(tl.trans(b_taps), 0) if AS_COLUMN else tl.sum(b_taps, 1)
    return _silu(b_u, KIND == tl.float32).to(KIND).to(tl.float32)  # noqa: SIM300


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
    BLOCK_W: tl.constexpr,
    BIASED: tl.constexpr,
    PDL: tl.constexpr,
):
    """A program has BLOCK_P rows of one head's state in one slot.

    Each convolves the B and C of its group again; the first of a group keeps their newest inputs.
    Of a ring nobody reads the place that is written, so the order of programs does not matter.
    """
    start_early(PDL)
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
    on = tl.load(active + i_r) != 0
    place = (tl.load(positions + i_r) % W).to(tl.int32)
    if on:
        # Every load comes before the first sum, at which the threads of a program wait for each
        # other; and that of the state, which takes longest, before all. [BLOCK_P, BLOCK_N]
        m_S = m_p[:, None] & m_n[None, :]
        p_S = ssm + (i_r * I + i_h * P + o_p[:, None]) * N + o_n[None, :]
        b_S = tl.load(p_S, mask=m_S, other=0.0).to(tl.float32)
        p_row = projected + i_r * stride
        p_ring = conv + i_r * (W * C)
        o_x, o_B, o_C = i_h * P + o_p, I + i_g * N + o_n, I + (G + i_g) * N + o_n
        of_row = p_row + I, p_ring, conv_weight, conv_bias, place
        first_x, first_B = i_h * P + i_p * BLOCK_P, I + i_g * N
        b_x = _taps(*of_row, first_x, P - i_p * BLOCK_P, C, W, BLOCK_P, BLOCK_W, BIASED)
        b_B = _taps(*of_row, first_B, N, C, W, BLOCK_N, BLOCK_W, BIASED)
        b_C = _taps(*of_row, first_B + G * N, N, C, W, BLOCK_N, BLOCK_W, BIASED)
        b_z = tl.load(p_row + o_x, mask=m_p, other=0.0).to(tl.float32)
        b_u = tl.load(p_row + I + C + i_h).to(tl.float32) + tl.load(dt_bias + i_h).to(tl.float32)
        b_A = -tl.exp(tl.load(A_log + i_h).to(tl.float32))
        b_skip = tl.load(D + i_h).to(tl.float32)
        tl.debug_barrier()  # which no load is moved behind, as ptxas would to save registers

        # [BLOCK_P], [BLOCK_N], [BLOCK_N]
        KIND: tl.constexpr = projected.dtype.element_ty
        b_x = _convolved(b_x, BLOCK_P, BLOCK_W, True, KIND)
        b_B = _convolved(b_B, BLOCK_N, BLOCK_W, False, KIND)
        b_C = _convolved(b_C, BLOCK_N, BLOCK_W, False, KIND)
        b_dt = tl.where(b_u == b_u, tl.minimum(tl.maximum(softplus(b_u), low), high), b_u)
        b_S = tl.exp(b_dt * b_A) * b_S + (b_dt * b_x)[:, None] * b_B[None, :]
        tl.store(p_S, b_S.to(ssm.dtype.element_ty), mask=m_S)
        b_y = tl.sum(b_S * b_C[None, :], 1) + b_skip * b_x
        tl.store(p_out, b_y * _silu(b_z, KIND == tl.float32), mask=m_p)  # noqa: SIM300
        p_place = p_ring + place * C
        _keep(p_place, p_row + I, o_x, m_p)
        if (i_p == 0) & (i_h % (H // G) == 0):
            _keep(p_place, p_row + I, o_B, m_n)
            _keep(p_place, p_row + I, o_C, m_n)
    else:
        tl.store(p_out, tl.zeros([BLOCK_P], tl.float32), mask=m_p)


@triton.jit
def _keep(p_place, p_new, o_c, m_c):
    """The newest inputs of channels `o_c`, at their place in the ring."""
    b_new = tl.load(p_new + o_c, mask=m_c, other=0.0)
    tl.store(p_place + o_c, b_new.to(p_place.dtype.element_ty), mask=m_c)


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
    return Blocks(p, max(1, min(8, p * block_n // 512)))


@on_device_of_first
def _step(projected: Tensor, tensors: tuple, numbers: tuple, constants: tuple, cut: Blocks) -> None:
    R, H, P, _ = tensors[1].shape
    step_kernel[R * H * -(-P // cut.p),](
        *(projected, *tensors, *numbers, *constants),
        num_warps=cut.warps,
        **early(projected.device),
    )


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
        (
            *(projected.stride(0), H, P, n_groups, N, W),
            *(cut.p, power_of_two(N), power_of_two(W), bias is not None),
        ),
        cut,
    )
    return out
