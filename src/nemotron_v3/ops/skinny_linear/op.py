"""Projections of a few rows, with the norm before them and the residual sum behind."""

import torch
from torch import Tensor

from nemotron_v3.ops.common import host
from nemotron_v3.ops.skinny_linear import portable
from nemotron_v3.ops.skinny_linear.norm import Norm


@torch.no_grad()
def skinny_linear(
    x: Tensor,
    *weights: Tensor,
    biases: tuple[Tensor | None, ...] | None = None,
    norm: Norm | None = None,
    residual: Tensor | None = None,
    out: Tensor,
    impl: str = "auto",
) -> Tensor:
    """`out = W (norm x) + b + residual` for the few rows of a decode step (README.md).

    Nothing is allocated on a GPU and no value is read, so that a CUDA graph can hold the call; no
    gradients flow.

    Args:
        x: `[R, n]`, rows of unit stride.
        weights: one to three `[m, n]` of one dtype, side by side in the result.
        biases: of each weight, `[m]`, for all of them or for none.
        norm: of x.
        residual: `[R, sum of m]`, laid out as `out`; it may be `out` itself.
        out: `[R, sum of m]`, in any floating dtype.
        impl: `"triton"` or `"portable"`; `"auto"` takes kernels on a GPU.

    Returns:
        `out`.
    """
    biases = (None,) * len(weights) if biases is None else biases
    form = portable.skinny_linear
    if host.takes_kernels(impl, x.device) and weights[0].dtype in host.DTYPES:
        from nemotron_v3.ops.skinny_linear import kernels

        form = kernels.skinny_linear
    return form(x, weights, biases, norm=norm, residual=residual, out=out)
