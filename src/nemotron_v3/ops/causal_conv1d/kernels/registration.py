"""The convolution as an op of `torch.library`, with its autograd formula."""

from typing import NamedTuple

import torch
from torch import Tensor

from nemotron_v3.layout import SequenceLayout
from nemotron_v3.ops.causal_conv1d.kernels import launch
from nemotron_v3.ops.common.host import (
    absent,
    contiguous,
    empty_like,
    gradients_of,
    register,
    schema,
    unit_stride,
)


class Arguments(NamedTuple):
    """Of the forward op: `launch.Inputs`, `launch.Tables` and the activation."""

    x: Tensor
    weight: Tensor
    bias: Tensor | None
    initial_states: Tensor | None
    position: Tensor
    seq_idx: Tensor
    cu_seqlens: Tensor
    silu: bool

    @property
    def inputs(self) -> launch.Inputs:
        weights = map(contiguous, (self.weight, self.bias, self.initial_states))
        return launch.Inputs(unit_stride(self.x), *weights)

    @property
    def tables(self) -> launch.Tables:
        return launch.Tables(*self[4:7])


class Upstream(NamedTuple):
    """What the backward op is given before `Arguments`."""

    dy: Tensor
    dfinal_states: Tensor | None


def _outputs(a: Arguments) -> launch.Outputs:
    shape = (a.tables.documents, *a.weight.shape)
    final_states = torch.empty(shape, dtype=a.x.dtype, device=a.x.device)
    return launch.Outputs(empty_like(a.x), final_states)


def _forward(*args) -> launch.Outputs:
    a = Arguments(*args)
    outputs = _outputs(a)
    launch.forward(a.inputs, a.tables, a.silu, outputs)
    return outputs


def _forward_fake(*args) -> launch.Outputs:
    return _outputs(Arguments(*args))


def _gradients(a: Arguments) -> launch.Gradients:
    return launch.Gradients(
        *[None if t is None else empty_like(t) for t in (a.x, a.weight, a.bias, a.initial_states)]
    )


def _returned(gradients: launch.Gradients) -> list[Tensor]:
    return [absent(gradients.dx) if g is None else g for g in gradients]


def _backward(*args) -> list[Tensor]:
    upstream, a = Upstream(*args[:2]), Arguments(*args[2:])
    gradients = _gradients(a)
    launch.backward(
        *(unit_stride(upstream.dy), contiguous(upstream.dfinal_states)),
        *(a.inputs, a.tables, a.silu, gradients),
    )
    return _returned(gradients)


def _backward_fake(*args) -> list[Tensor]:
    return _returned(_gradients(Arguments(*args[2:])))


def _setup_context(ctx, inputs, output) -> None:
    *tensors, ctx.silu = inputs
    ctx.save_for_backward(*tensors)
    ctx.set_materialize_grads(False)


def _autograd(ctx, dy, dfinal_states) -> Arguments:
    a = Arguments(*ctx.saved_tensors, ctx.silu)
    if dy is None:
        dy = torch.zeros_like(a.x)
    g = launch.Gradients(*_backward_op(dy, dfinal_states, *a))
    return gradients_of(
        Arguments,
        x=g.dx,
        weight=g.dweight,
        bias=None if a.bias is None else g.dbias,
        initial_states=None if a.initial_states is None else g.dinitial_states,
    )


_backward_op = register(
    schema("causal_conv1d_backward", Upstream, Arguments, results=4), _backward, _backward_fake
)
_forward_op = register(
    schema("causal_conv1d", Arguments, results=2),
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
    inputs = launch.Inputs(x, weight, bias, initial_states)
    y, final_states = _forward_op(*inputs, *launch.tables(layout), activation == "silu")
    return y, final_states if return_final_states else None
