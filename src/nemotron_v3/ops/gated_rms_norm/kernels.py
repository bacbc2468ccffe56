"""Gated, grouped RMS normalisation in Triton: one pass over memory each way (README.md).

Letters: T packed tokens, D width, G groups. `rms_norm` is the same kernel with one group, without a
gate. A program holds BLOCK_T tokens of one group; all arithmetic is fp32.
"""

import torch
import triton.language as tl
from torch import Tensor

from nemotron_v3.ops.common.host import interpreted, power_of_two, programs, register, unit_stride
from nemotron_v3.ops.common.jit import kernel
from nemotron_v3.ops.common.launch import Launcher
from nemotron_v3.ops.common.sums import sum_partials


@kernel
def forward_kernel(
    y,
    z,
    weight,
    out,
    T,
    eps,
    stride_y: tl.constexpr,
    stride_z: tl.constexpr,
    GROUPS: tl.constexpr,
    SIZE: tl.constexpr,
    BLOCK_T: tl.constexpr,
    BLOCK_D: tl.constexpr,
    GATED: tl.constexpr,
):
    i_g = tl.program_id(0) % GROUPS
    i_t = (tl.program_id(0) // GROUPS).to(tl.int64) * BLOCK_T
    o_t = tl.arange(0, BLOCK_T)
    o_d = tl.arange(0, BLOCK_D)
    m_d = o_d < SIZE
    m_td = (i_t + o_t < T)[:, None] & m_d[None, :]
    column = i_g * SIZE

    # [BLOCK_T, BLOCK_D]
    p_y = y + i_t * stride_y + column + o_t[:, None] * stride_y + o_d[None, :]
    b_v = tl.load(p_y, mask=m_td, other=0.0).to(tl.float32)
    if GATED:
        p_z = z + i_t * stride_z + column + o_t[:, None] * stride_z + o_d[None, :]
        b_z = tl.load(p_z, mask=m_td, other=0.0).to(tl.float32)
        b_v *= b_z / (1.0 + tl.exp(-b_z))
    # [BLOCK_D]
    b_w = tl.load(weight + column + o_d, mask=m_d, other=0.0).to(tl.float32)

    b_rstd = 1.0 / tl.sqrt(tl.sum(b_v * b_v, 1) / SIZE + eps)
    b_out = b_v * b_rstd[:, None] * b_w[None, :]
    stride_o = GROUPS * SIZE
    p_out = out + i_t * stride_o + column + o_t[:, None] * stride_o + o_d[None, :]
    tl.store(p_out, b_out.to(out.dtype.element_ty), mask=m_td)


@kernel
def backward_kernel(
    dout,
    y,
    z,
    weight,
    dy,
    dz,
    dweight,
    T,
    eps,
    stride_dout: tl.constexpr,
    stride_y: tl.constexpr,
    stride_z: tl.constexpr,
    stride_dy: tl.constexpr,
    stride_dz: tl.constexpr,
    GROUPS: tl.constexpr,
    SIZE: tl.constexpr,
    BLOCK_T: tl.constexpr,
    BLOCK_D: tl.constexpr,
    GATED: tl.constexpr,
    STAGES: tl.constexpr,
):
    """Program i of n takes every n-th block of tokens and leaves its sum of dweight in row i."""
    i_g = tl.program_id(0) % GROUPS
    i_n = (tl.program_id(0) // GROUPS).to(tl.int64)
    n = tl.num_programs(0) // GROUPS
    o_t = tl.arange(0, BLOCK_T)
    o_d = tl.arange(0, BLOCK_D)
    m_d = o_d < SIZE
    column = i_g * SIZE
    # [BLOCK_D]
    b_w = tl.load(weight + column + o_d, mask=m_d, other=0.0).to(tl.float32)
    b_dw = tl.zeros([BLOCK_T, BLOCK_D], tl.float32)

    for i_b in tl.range(i_n, tl.cdiv(T, BLOCK_T), n, num_stages=STAGES):
        i_t = i_b * BLOCK_T
        m_td = (i_t + o_t < T)[:, None] & m_d[None, :]
        # [BLOCK_T, BLOCK_D]
        p_dout = dout + i_t * stride_dout + column + o_t[:, None] * stride_dout + o_d[None, :]
        p_y = y + i_t * stride_y + column + o_t[:, None] * stride_y + o_d[None, :]
        b_dout = tl.load(p_dout, mask=m_td, other=0.0).to(tl.float32)
        b_y = tl.load(p_y, mask=m_td, other=0.0).to(tl.float32)
        if GATED:
            p_z = z + i_t * stride_z + column + o_t[:, None] * stride_z + o_d[None, :]
            b_z = tl.load(p_z, mask=m_td, other=0.0).to(tl.float32)
            b_s = 1.0 / (1.0 + tl.exp(-b_z))
            b_gate = b_z * b_s
            b_v = b_y * b_gate
        else:
            b_v = b_y
        b_dhat = b_dout * b_w[None, :]
        b_rstd = 1.0 / tl.sqrt(tl.sum(b_v * b_v, 1) / SIZE + eps)
        b_dot = tl.sum(b_v * b_dhat, 1) / SIZE
        b_dw += b_dout * b_v * b_rstd[:, None]
        b_dv = b_rstd[:, None] * (b_dhat - b_v * (b_dot * b_rstd * b_rstd)[:, None])
        p_dy = dy + i_t * stride_dy + column + o_t[:, None] * stride_dy + o_d[None, :]
        if GATED:
            p_dz = dz + i_t * stride_dz + column + o_t[:, None] * stride_dz + o_d[None, :]
            b_dz = b_dv * b_y * (b_s + b_gate * (1.0 - b_s))
            tl.store(p_dz, b_dz.to(dz.dtype.element_ty), mask=m_td)
            tl.store(p_dy, (b_dv * b_gate).to(dy.dtype.element_ty), mask=m_td)
        else:
            tl.store(p_dy, b_dv.to(dy.dtype.element_ty), mask=m_td)

    p_dw = dweight + i_n * GROUPS * SIZE + column + o_d
    tl.store(p_dw, tl.sum(b_dw, 0), mask=m_d)


# --- launchers: tensors [T, D] with neighbouring columns ------------------------------------------

_launch_forward = Launcher(forward_kernel)
_launch_backward = Launcher(backward_kernel)


def _stride(x: Tensor | None) -> int:
    return 0 if x is None else x.stride(0)


def _blocks(size: int) -> tuple[int, int, int, int]:
    """(BLOCK_T, BLOCK_D, warps, stages of the backward).

    16 bytes a thread and load where a row is long enough, and a pipeline where rows are short
    enough for several of them to stand in shared memory.
    """
    block_d = power_of_two(size)
    block_t = 128 if interpreted() else max(1, 1024 // block_d)
    stages = 3 if block_d <= 1024 else 1
    return block_t, block_d, min(8, max(1, block_t * block_d // 512)), stages


def launch_forward(
    y: Tensor, z: Tensor | None, weight: Tensor, out: Tensor, group_size: int, eps: float
) -> None:
    T, D = y.shape
    groups = D // group_size
    block_t, block_d, warps, _ = _blocks(group_size)
    _launch_forward(
        groups * -(-T // block_t),
        (y, z, weight, out),
        (T, eps),
        (y.stride(0), _stride(z), groups, group_size, block_t, block_d, z is not None),
        warps,
    )


def launch_backward(
    dout: Tensor,
    y: Tensor,
    z: Tensor | None,
    weight: Tensor,
    dy: Tensor,
    dz: Tensor | None,
    group_size: int,
    eps: float,
) -> Tensor:
    """Writes dy and dz; returns dweight in the weight's dtype."""
    T, D = y.shape
    groups = D // group_size
    block_t, block_d, warps, stages = _blocks(group_size)
    most = max(1, programs(y.device, max(1, 24 // warps)) // groups)
    n = min(most, max(1, -(-T // block_t)))
    partial = torch.empty(n, D, dtype=torch.float32, device=y.device)
    _launch_backward(
        groups * n,
        (dout, y, z, weight, dy, dz, partial),
        (T, eps),
        (
            *(dout.stride(0), y.stride(0), _stride(z), dy.stride(0), _stride(dz)),
            *(groups, group_size, block_t, block_d, z is not None, stages),
        ),
        warps,
    )
    return sum_partials(partial[:, None], ((D,), weight.dtype))[0]


# --- registration ---------------------------------------------------------------------------------


def _forward(
    y: Tensor,
    z: Tensor | None,
    weight: Tensor,
    group_size: int,
    eps: float,
    out_dtype: torch.dtype,
) -> Tensor:
    out = torch.empty(y.shape, dtype=out_dtype, device=y.device)
    launch_forward(unit_stride(y), unit_stride(z), weight.contiguous(), out, group_size, eps)
    return out


def _forward_fake(y, z, weight, group_size, eps, out_dtype):
    return torch.empty(y.shape, dtype=out_dtype, device=y.device)


def _backward(
    dout: Tensor, y: Tensor, z: Tensor | None, weight: Tensor, group_size: int, eps: float
) -> tuple[Tensor, Tensor, Tensor]:
    dy = torch.empty(y.shape, dtype=y.dtype, device=y.device)
    dz = None if z is None else torch.empty(z.shape, dtype=z.dtype, device=z.device)
    dweight = launch_backward(
        unit_stride(dout),
        unit_stride(y),
        unit_stride(z),
        weight.contiguous(),
        dy,
        dz,
        group_size,
        eps,
    )
    return dy, dy.new_empty(0) if dz is None else dz, dweight


def _backward_fake(dout, y, z, weight, group_size, eps):
    dz = y.new_empty(0) if z is None else torch.empty(z.shape, dtype=z.dtype, device=z.device)
    dy = torch.empty(y.shape, dtype=y.dtype, device=y.device)
    return dy, dz, torch.empty(weight.shape, dtype=weight.dtype, device=weight.device)


def _setup_context(ctx, inputs, output) -> None:
    y, z, weight, ctx.group_size, ctx.eps, _ = inputs
    ctx.save_for_backward(y, z, weight)


def _autograd(ctx, dout):
    y, z, weight = ctx.saved_tensors
    dy, dz, dweight = _backward_op(dout, y, z, weight, ctx.group_size, ctx.eps)
    return dy, None if z is None else dz, dweight, None, None, None


_backward_op = register(
    "gated_rms_norm_backward(Tensor dout, Tensor y, Tensor? z, Tensor weight, SymInt group_size, "
    "float eps) -> (Tensor, Tensor, Tensor)",
    _backward,
    _backward_fake,
)
_forward_op = register(
    "gated_rms_norm(Tensor y, Tensor? z, Tensor weight, SymInt group_size, float eps, "
    "ScalarType out_dtype) -> Tensor",
    _forward,
    _forward_fake,
    setup_context=_setup_context,
    backward=_autograd,
)


def gated_rms_norm(
    y: Tensor,
    z: Tensor | None,
    weight: Tensor,
    group_size: int,
    eps: float = 1e-5,
    out_dtype: torch.dtype | None = None,
) -> Tensor:
    flat = y.flatten(0, -2) if y.dim() != 2 else y
    gate = z.flatten(0, -2) if z is not None and z.dim() != 2 else z
    if y.dim() == 1:
        flat, gate = y[None], None if z is None else z[None]
    out = _forward_op(flat, gate, weight, group_size, eps, out_dtype or y.dtype)
    return out.view(y.shape)


def rms_norm(
    x: Tensor, weight: Tensor, eps: float = 1e-5, out_dtype: torch.dtype | None = None
) -> Tensor:
    """`ops.rms_norm`: one group and no gate."""
    return gated_rms_norm(x, None, weight, weight.shape[0], eps, out_dtype)
