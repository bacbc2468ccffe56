"""Products of fp32 matrices on a CPU by oneDNN, which PyTorch leaves to its BLAS.

On a Zen 4 core oneDNN multiplies at 102 to 111 GFLOP/s where MKL reaches 75 to 96, and it rounds
a row in the same way however many rows stand beside it. PyTorch has the operation for its own
compiler; where it is missing, everything here says no.

Letters: r rows; n inputs, m outputs of a linear layer.
"""

import functools
from typing import Any

import torch
from torch import Tensor, nn

from nemotron_v3.ops import compat

# Multiplications below which a call costs more than it saves.
SMALLEST = 1 << 23


@functools.cache
def onednn_works() -> bool:
    """Whether this PyTorch has the operation, and it multiplies in fp32."""
    if not torch.backends.mkldnn.is_available():
        return False
    kind = {"dtype": torch.float32, "device": "cpu"}
    weight, x = torch.linspace(-1, 1, 96, **kind).view(12, 8), torch.ones(2, 8, **kind)
    try:
        products = product(x, weight), PackedWeight(weight, 2)(x)
    except (AttributeError, RuntimeError):
        return False
    return all(bool((y - x @ weight.t()).abs().max() < 1e-5) for y in products)


def product(x: Tensor, weight: Tensor) -> Tensor:
    """`x weight^T`, `[r, n]` and `[m, n]`."""
    if not (weight.is_contiguous() or weight.t().is_contiguous()):
        weight = weight.contiguous()
    return compat.onednn_linear(x.contiguous(), weight)


class PackedWeight:
    """A weight `[m, n]` in the order in which oneDNN multiplies `rows` rows by it.

    For a few rows it is 2 to 3 times as fast as BLAS, which packs a weight anew at each call.
    """

    def __init__(self, weight: Tensor, rows: int):
        self._weight = compat.onednn_packed(weight.contiguous(), rows)

    def __call__(self, x: Tensor) -> Tensor:
        """`[rows, n]` -> `[rows, m]`."""
        return compat.onednn_linear(x, self._weight)


@functools.cache
def rows_are_alike(n: int, m: int, threads: int) -> bool:
    """Whether a row's product is the same, bit for bit, in any company of at least one other."""
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(515, n, generator=generator)
    for weight in (torch.randn(m, n, generator=generator), torch.randn(n, m, generator=generator)):
        weight = weight if weight.shape == (m, n) else weight.t()
        whole = product(x, weight)
        for start, rows in ((0, 2), (1, 3), (2, 5), (7, 16), (3, 31), (5, 64), (9, 129), (0, 400)):
            some = slice(start, start + rows)
            if not torch.equal(product(x[some], weight), whole[some]):
                return False
    return True


def linear(layer: nn.Linear, x: Tensor) -> Tensor | None:
    """What a plain linear layer makes of `[..., n]`, or None where it has to be called itself.

    That is in other dtypes, under autocast, modes and transforms of PyTorch and for weights of
    another kind. Whether there is enough to multiply, hooks and compilers are the caller's to look
    for.
    """
    weight = layer.weight
    if (
        type(weight) is not nn.Parameter
        or type(x) is not Tensor
        or x.dtype != torch.float32
        or weight.dtype != torch.float32
        or not (x.is_cpu and weight.is_cpu and weight.is_contiguous())
        or torch.is_autocast_enabled("cpu")
        or compat.dispatch_modes()
        or compat.current_transform() is not None
        or not onednn_works()
    ):
        return None
    y = _Product.apply(x.reshape(-1, x.shape[-1]), weight).view(*x.shape[:-1], -1)
    return y if layer.bias is None else y + layer.bias


class _Product(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor) -> Tensor:
        ctx.save_for_backward(x, weight)
        return product(x, weight)

    @staticmethod
    def backward(ctx: Any, dy: Tensor) -> tuple[Tensor | None, ...]:
        x, weight = ctx.saved_tensors
        dx = _Product.apply(dy, weight.t()) if ctx.needs_input_grad[0] else None
        # Here both operands would have to be transposed first: BLAS is as fast.
        dweight = dy.t() @ x if ctx.needs_input_grad[1] else None
        return dx, dweight
