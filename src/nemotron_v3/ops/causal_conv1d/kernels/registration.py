"""The convolution as an op of `torch.library`, with its autograd formula."""

import torch
from torch import Tensor

from nemotron_v3.layout import SequenceLayout
from nemotron_v3.ops.causal_conv1d.kernels.launch import launch_backward, launch_forward, tables
from nemotron_v3.ops.common.host import register, unit_stride


def _forward(x, weight, bias, initial, position, seq_idx, cu_seqlens, silu):
    return launch_forward(
        unit_stride(x),
        weight.contiguous(),
        None if bias is None else bias.contiguous(),
        None if initial is None else initial.contiguous(),
        position,
        seq_idx,
        cu_seqlens,
        silu,
    )


def _forward_fake(x, weight, bias, initial, position, seq_idx, cu_seqlens, silu):
    documents = cu_seqlens.shape[0] - 1
    y = torch.empty(x.shape, dtype=x.dtype, device=x.device)
    return y, torch.empty((documents, *weight.shape), dtype=x.dtype, device=x.device)


def _backward(dy, dfinal, x, weight, bias, initial, position, seq_idx, cu_seqlens, silu):
    dx = torch.empty(x.shape, dtype=x.dtype, device=x.device)
    dweight, dbias, dinitial = launch_backward(
        unit_stride(dy),
        None if dfinal is None else dfinal.contiguous(),
        unit_stride(x),
        weight.contiguous(),
        None if bias is None else bias.contiguous(),
        None if initial is None else initial.contiguous(),
        position,
        seq_idx,
        cu_seqlens,
        silu,
        dx,
    )
    absent = dx.new_empty(0)
    return (
        dx,
        dweight,
        absent if dbias is None else dbias,
        dx.new_empty(0) if dinitial is None else dinitial,
    )


def _backward_fake(dy, dfinal, x, weight, bias, initial, position, seq_idx, cu_seqlens, silu):
    def like(t):
        return x.new_empty(0) if t is None else torch.empty(t.shape, dtype=t.dtype, device=t.device)

    return like(x), like(weight), like(bias), like(initial)


def _setup_context(ctx, inputs, output) -> None:
    *tensors, ctx.silu = inputs
    ctx.save_for_backward(*tensors)
    ctx.set_materialize_grads(False)


def _autograd(ctx, dy, dfinal):
    x, weight, bias, initial, *layout = ctx.saved_tensors
    if dy is None:
        dy = torch.zeros_like(x)
    dx, dweight, dbias, dinitial = _backward_op(
        dy, dfinal, x, weight, bias, initial, *layout, ctx.silu
    )
    dbias = None if bias is None else dbias
    return dx, dweight, dbias, None if initial is None else dinitial, None, None, None, None


_LAYOUT = "Tensor position, Tensor seq_idx, Tensor cu_seqlens"
_backward_op = register(
    "causal_conv1d_backward(Tensor dy, Tensor? dfinal, Tensor x, Tensor weight, Tensor? bias, "
    f"Tensor? initial, {_LAYOUT}, bool silu) -> (Tensor, Tensor, Tensor, Tensor)",
    _backward,
    _backward_fake,
)
_forward_op = register(
    "causal_conv1d(Tensor x, Tensor weight, Tensor? bias, Tensor? initial, "
    f"{_LAYOUT}, bool silu) -> (Tensor, Tensor)",
    _forward,
    _forward_fake,
    setup_context=_setup_context,
    backward=_autograd,
)


def causal_conv1d(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    *,
    layout: SequenceLayout,
    activation: str | None = "silu",
    initial_states: Tensor | None = None,
    return_final_states: bool = False,
) -> tuple[Tensor, Tensor | None]:
    if initial_states is not None:
        initial_states = initial_states.to(x.dtype)
    position, seq_idx = tables(layout)
    y, final = _forward_op(
        x,
        weight,
        bias,
        initial_states,
        position,
        seq_idx,
        layout.cu_seqlens,
        activation == "silu",
    )
    return y, final if return_final_states else None
