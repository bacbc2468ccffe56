"""The squared rectifier in Triton: one pass over memory each way (README.md).

The backward needs the result alone, which the projection behind keeps anyway.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from nemotron_v3.ops.common.host import interpreted, register
from nemotron_v3.ops.common.jit import kernel


@kernel
def forward_kernel(x, y, size, BLOCK: tl.constexpr):
    o = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    b_x = tl.load(x + o, mask=o < size, other=0.0).to(tl.float32)
    b_relu = tl.where(b_x <= 0.0, 0.0, b_x)  # NaN stays
    tl.store(y + o, (b_relu * b_relu).to(y.dtype.element_ty), mask=o < size)


@kernel
def backward_kernel(dy, y, dx, size, BLOCK: tl.constexpr):
    o = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    b_y = tl.load(y + o, mask=o < size, other=0.0).to(tl.float32)
    b_dy = tl.load(dy + o, mask=o < size, other=0.0).to(tl.float32)
    tl.store(dx + o, (2.0 * b_dy * tl.sqrt(b_y)).to(dx.dtype.element_ty), mask=o < size)


def _blocks(x: Tensor) -> tuple[int, tuple[int]]:
    block = 1 << 16 if interpreted() else 2048
    return block, (triton.cdiv(x.numel(), block),)


def _forward(x: Tensor) -> Tensor:
    x = x.contiguous()
    y = torch.empty_like(x)
    block, grid = _blocks(x)
    forward_kernel[grid](x, y, x.numel(), block, num_warps=4)
    return y


def _forward_fake(x: Tensor) -> Tensor:
    return torch.empty(x.shape, dtype=x.dtype, device=x.device)


def _backward(dy: Tensor, y: Tensor) -> Tensor:
    dx = torch.empty_like(y)
    block, grid = _blocks(y)
    backward_kernel[grid](dy.contiguous(), y, dx, y.numel(), block, num_warps=4)
    return dx


def _backward_fake(dy: Tensor, y: Tensor) -> Tensor:
    return torch.empty(y.shape, dtype=y.dtype, device=y.device)


def _setup_context(ctx, inputs, output) -> None:
    ctx.save_for_backward(output)


def _autograd(ctx, dy):
    (y,) = ctx.saved_tensors
    return _backward_op(dy, y)


_backward_op = register("relu2_backward(Tensor dy, Tensor y) -> Tensor", _backward, _backward_fake)
_forward_op = register(
    "relu2(Tensor x) -> Tensor",
    _forward,
    _forward_fake,
    setup_context=_setup_context,
    backward=_autograd,
)


def relu2(x: Tensor) -> Tensor:
    return _forward_op(x)
