"""Gated, grouped RMS normalisation in Triton: one pass over memory each way (README.md).

Letters: T packed tokens, D width, G groups. `rms_norm` is the same kernel with one group, without a
gate. A program holds BLOCK_T tokens of one group; all arithmetic is fp32.
"""

from typing import NamedTuple

import torch
import triton.language as tl
from torch import Tensor

from nemotron_v3.ops.common.host import (
    absent,
    empty_like,
    gradients_of,
    interpreted,
    power_of_two,
    programs,
    register,
    schema,
    unit_stride,
)
from nemotron_v3.ops.common.jit import kernel
from nemotron_v3.ops.common.launch import Launcher
from nemotron_v3.ops.common.sums import sum_partials


class Gradients(NamedTuple):
    """Where gradients go; that of z is None where there is no gate."""

    dy: Tensor
    dz: Tensor | None
    dweight: Tensor


@kernel
def gated_rms_norm_fwd_kernel(
    y,
    z,
    weight,
    out,
    T,
    eps,
    STRIDES: tl.constexpr,
    SIZES: tl.constexpr,
):
    i_g = tl.program_id(0) % SIZES.GROUPS
    i_t = (tl.program_id(0) // SIZES.GROUPS).to(tl.int64) * SIZES.BLOCK_T
    o_t = tl.arange(0, SIZES.BLOCK_T)
    o_d = tl.arange(0, SIZES.BLOCK_D)
    m_d = o_d < SIZES.SIZE
    m_td = (i_t + o_t < T)[:, None] & m_d[None, :]
    column = i_g * SIZES.SIZE

    # [BLOCK_T, BLOCK_D]
    p_y = y + i_t * STRIDES.y + column + o_t[:, None] * STRIDES.y + o_d[None, :]
    b_v = tl.load(p_y, mask=m_td, other=0.0).to(tl.float32)
    if z is not None:
        p_z = z + i_t * STRIDES.z + column + o_t[:, None] * STRIDES.z + o_d[None, :]
        b_z = tl.load(p_z, mask=m_td, other=0.0).to(tl.float32)
        b_v *= b_z / (1.0 + tl.exp(-b_z))
    # [BLOCK_D]
    b_w = tl.load(weight + column + o_d, mask=m_d, other=0.0).to(tl.float32)

    b_rstd = 1.0 / tl.sqrt(tl.sum(b_v * b_v, 1) / SIZES.SIZE + eps)
    b_out = b_v * b_rstd[:, None] * b_w[None, :]
    stride_o = SIZES.GROUPS * SIZES.SIZE
    p_out = out + i_t * stride_o + column + o_t[:, None] * stride_o + o_d[None, :]
    tl.store(p_out, b_out.to(out.dtype.element_ty), mask=m_td)


@kernel
def gated_rms_norm_bwd_kernel(
    dout,
    y,
    z,
    weight,
    dy,
    dz,
    dweight,
    T,
    eps,
    STRIDES: tl.constexpr,
    SIZES: tl.constexpr,
    STAGES: tl.constexpr,
):
    """Program i of n takes every n-th block of tokens and leaves its sum of dweight in row i."""
    i_g = tl.program_id(0) % SIZES.GROUPS
    i_n = (tl.program_id(0) // SIZES.GROUPS).to(tl.int64)
    n = tl.num_programs(0) // SIZES.GROUPS
    o_t = tl.arange(0, SIZES.BLOCK_T)
    o_d = tl.arange(0, SIZES.BLOCK_D)
    m_d = o_d < SIZES.SIZE
    column = i_g * SIZES.SIZE
    # [BLOCK_D]
    b_w = tl.load(weight + column + o_d, mask=m_d, other=0.0).to(tl.float32)
    b_dw = tl.zeros([tl.constexpr(SIZES.BLOCK_T), tl.constexpr(SIZES.BLOCK_D)], tl.float32)

    for i_b in tl.range(i_n, tl.cdiv(T, SIZES.BLOCK_T), n, num_stages=STAGES):
        i_t = i_b * SIZES.BLOCK_T
        m_td = (i_t + o_t < T)[:, None] & m_d[None, :]
        # [BLOCK_T, BLOCK_D]
        p_dout = dout + i_t * STRIDES.dout + column + o_t[:, None] * STRIDES.dout + o_d[None, :]
        p_y = y + i_t * STRIDES.y + column + o_t[:, None] * STRIDES.y + o_d[None, :]
        b_dout = tl.load(p_dout, mask=m_td, other=0.0).to(tl.float32)
        b_y = tl.load(p_y, mask=m_td, other=0.0).to(tl.float32)
        if z is not None:
            p_z = z + i_t * STRIDES.z + column + o_t[:, None] * STRIDES.z + o_d[None, :]
            b_z = tl.load(p_z, mask=m_td, other=0.0).to(tl.float32)
            b_s = 1.0 / (1.0 + tl.exp(-b_z))
            b_gate = b_z * b_s
            b_v = b_y * b_gate
        else:
            b_v = b_y
        b_dhat = b_dout * b_w[None, :]
        b_rstd = 1.0 / tl.sqrt(tl.sum(b_v * b_v, 1) / SIZES.SIZE + eps)
        b_dot = tl.sum(b_v * b_dhat, 1) / SIZES.SIZE
        b_dw += b_dout * b_v * b_rstd[:, None]
        b_dv = b_rstd[:, None] * (b_dhat - b_v * (b_dot * b_rstd * b_rstd)[:, None])
        p_dy = dy + i_t * STRIDES.dy + column + o_t[:, None] * STRIDES.dy + o_d[None, :]
        if z is not None:
            p_dz = dz + i_t * STRIDES.dz + column + o_t[:, None] * STRIDES.dz + o_d[None, :]
            b_dz = b_dv * b_y * (b_s + b_gate * (1.0 - b_s))
            tl.store(p_dz, b_dz.to(dz.dtype.element_ty), mask=m_td)
            tl.store(p_dy, (b_dv * b_gate).to(dy.dtype.element_ty), mask=m_td)
        else:
            tl.store(p_dy, b_dv.to(dy.dtype.element_ty), mask=m_td)

    p_dw = dweight + i_n * SIZES.GROUPS * SIZES.SIZE + column + o_d
    tl.store(p_dw, tl.sum(b_dw, 0), mask=m_d)


# --- launchers: tensors [T, D] with neighbouring columns ------------------------------------------

_launch_forward = Launcher(gated_rms_norm_fwd_kernel)
_launch_backward = Launcher(gated_rms_norm_bwd_kernel)


class Strides(NamedTuple):
    """From token to token; 0 where there is no gate."""

    y: int
    z: int
    dout: int = 0
    dy: int = 0
    dz: int = 0


class Sizes(NamedTuple):
    """What the kernels are compiled for: GROUPS of SIZE columns."""

    GROUPS: int
    SIZE: int
    BLOCK_T: int
    BLOCK_D: int

    @classmethod
    def of(cls, width: int, group_size: int) -> "Sizes":
        block_d = power_of_two(group_size)
        block_t = 128 if interpreted() else max(1, 1024 // block_d)
        return cls(width // group_size, group_size, block_t, block_d)

    @property
    def warps(self) -> int:
        """16 bytes a thread and load where a row is long enough."""
        return min(8, max(1, self.BLOCK_T * self.BLOCK_D // 512))

    @property
    def stages(self) -> int:
        """Of the backward: a pipeline where several rows can stand in shared memory."""
        return 3 if self.BLOCK_D <= 1024 else 1


def _stride(x: Tensor | None) -> int:
    return 0 if x is None else x.stride(0)


def launch_forward(
    y: Tensor, z: Tensor | None, weight: Tensor, out: Tensor, group_size: int, eps: float
) -> None:
    T, D = y.shape
    sizes = Sizes.of(D, group_size)
    _launch_forward(
        sizes.GROUPS * -(-T // sizes.BLOCK_T),
        (y, z, weight, out),
        (T, eps),
        (Strides(y.stride(0), _stride(z)), sizes),
        sizes.warps,
    )


def launch_backward(
    dout: Tensor,
    y: Tensor,
    z: Tensor | None,
    weight: Tensor,
    gradients: Gradients,
    group_size: int,
    eps: float,
) -> None:
    """Writes the gradients."""
    dy, dz, dweight = gradients
    T, D = y.shape
    sizes = Sizes.of(D, group_size)
    warps = sizes.warps
    most = max(1, programs(y.device, max(1, 24 // warps)) // sizes.GROUPS)
    n = min(most, max(1, -(-T // sizes.BLOCK_T)))
    partial = torch.empty(n, D, dtype=torch.float32, device=y.device)
    strides = Strides(y.stride(0), _stride(z), dout.stride(0), dy.stride(0), _stride(dz))
    _launch_backward(
        sizes.GROUPS * n,
        (dout, y, z, weight, dy, dz, partial),
        (T, eps),
        (strides, sizes, sizes.stages),
        warps,
    )
    sum_partials(partial[:, None], dweight)


# --- registration ---------------------------------------------------------------------------------


class Arguments(NamedTuple):
    """Of the forward op."""

    y: Tensor
    z: Tensor | None
    weight: Tensor
    group_size: int
    eps: float
    out_dtype: torch.dtype


class Upstream(NamedTuple):
    """What the backward op is given before `Arguments`."""

    dout: Tensor


def _output(a: Arguments) -> Tensor:
    return torch.empty(a.y.shape, dtype=a.out_dtype, device=a.y.device)


def _forward(*args) -> Tensor:
    a = Arguments(*args)
    out = _output(a)
    launch_forward(
        *(unit_stride(a.y), unit_stride(a.z), a.weight.contiguous(), out, a.group_size, a.eps)
    )
    return out


def _forward_fake(*args) -> Tensor:
    return _output(Arguments(*args))


def _gradients(a: Arguments) -> Gradients:
    dz = None if a.z is None else empty_like(a.z)
    return Gradients(empty_like(a.y), dz, empty_like(a.weight))


def _returned(gradients: Gradients) -> Gradients:
    return gradients._replace(dz=absent(gradients.dy)) if gradients.dz is None else gradients


def _backward(*args) -> Gradients:
    (dout,), a = Upstream(*args[:1]), Arguments(*args[1:])
    gradients = _gradients(a)
    launch_backward(
        *(unit_stride(dout), unit_stride(a.y), unit_stride(a.z), a.weight.contiguous()),
        *(gradients, a.group_size, a.eps),
    )
    return _returned(gradients)


def _backward_fake(*args) -> Gradients:
    return _returned(_gradients(Arguments(*args[1:])))


def _setup_context(ctx, inputs, output) -> None:
    y, z, weight, *ctx.options = inputs
    ctx.save_for_backward(y, z, weight)


def _autograd(ctx, dout) -> Arguments:
    a = Arguments(*ctx.saved_tensors, *ctx.options)
    g = Gradients(*_backward_op(dout, *a))
    return gradients_of(Arguments, y=g.dy, z=None if a.z is None else g.dz, weight=g.dweight)


_backward_op = register(
    schema("gated_rms_norm_backward", Upstream, Arguments, results=3), _backward, _backward_fake
)
_forward_op = register(
    schema("gated_rms_norm", Arguments, results=1),
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
