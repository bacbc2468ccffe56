"""Both halves of a decode step's mixture of experts, on preallocated buffers (README.md).

Nothing is allocated on a GPU and no value is read, so that a CUDA graph can hold the calls; no
gradients flow. Letters: R rows, D hidden size, E experts, F expert width, X width the experts see.
"""

from typing import Any

import torch
from torch import Tensor

from nemotron_v3.ops.common import host
from nemotron_v3.ops.decode_experts import portable
from nemotron_v3.ops.decode_experts.buffers import Buffers
from nemotron_v3.ops.decode_experts.weights import Router


@torch.no_grad()
def route(
    stream: Tensor, router: Router, active: Tensor, buffers: Buffers, *, impl: str = "auto"
) -> None:
    """Norm, logits and choice of experts of `stream` `[R, D]`, into the buffers.

    Args:
        active: integers `[R]`; a row with 0 there chooses no expert.
        impl: `"triton"` or `"portable"`; `"auto"` takes kernels on a GPU.
    """
    _form(impl, stream, router.gate).route(stream, router, active, buffers)


@torch.no_grad()
def experts(
    x: Tensor,
    routed: tuple[Tensor, Tensor] | None,
    shared: tuple[Tensor, Tensor] | None,
    active: Tensor,
    buffers: Buffers,
    *,
    residual: Tensor | None = None,
    out: Tensor,
    impl: str = "auto",
) -> Tensor:
    """The sum of the routed experts in the order of a row's choices, of the shared one and of the
    residual stream, whichever are given.

    Args:
        x: `[R, X]`, what the routed experts see; the shared one sees `buffers.normed`.
        routed: `[E, F, X]` and `[E, X, F]`; shared: both weights of the shared expert. Either may
            be None.
        residual: laid out as `out`; it may be `out` itself.
        out: `[R, X]`, contiguous; inactive rows stay as they are, or hold anything if R is 1.
    """
    form = _form(impl, x, (routed or shared)[0])
    return form.experts(x, routed, shared, active, buffers, residual=residual, out=out)


def _form(impl: str, x: Tensor, weight: Tensor) -> Any:
    if host.takes_kernels(impl, x.device) and weight.dtype in host.DTYPES:
        from nemotron_v3.ops.decode_experts import kernels

        return kernels
    return portable
