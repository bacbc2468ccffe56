"""Causal depthwise convolution in plain PyTorch.

Letters: T packed tokens, n_docs documents, C channels, W taps; u is the sum before the activation.

The packed tokens are one stream, taken block by block; the first tokens of each document are done
again behind its own state (`portable_borders`). The backward pass keeps the inputs and computes u
again (README.md, 'How the portable form computes the backward').
"""

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.autograd.function import once_differentiable

from nemotron_v3.layout import SequenceLayout
from nemotron_v3.ops.causal_conv1d.portable_backward import backward
from nemotron_v3.ops.causal_conv1d.portable_borders import Borders
from nemotron_v3.ops.causal_conv1d.portable_taps import head_inputs, sum_of_taps
from nemotron_v3.ops.common.blocks import row_blocks
from nemotron_v3.ops.common.precision import WIDE


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
    borders = borders_of(layout, weight.shape[1])
    y = _Conv.apply(x, weight, bias, initial_states, borders, activation)
    return y, final_states(x, initial_states, borders) if return_final_states else None


def borders_of(layout: SequenceLayout, W: int) -> Borders:
    return layout.derived(("causal_conv1d", W), lambda it: Borders.of(it, W))


def final_states(x: Tensor, states: Tensor | None, borders: Borders) -> Tensor:
    """The last W inputs of each document, `[n_docs, C, W]`, after its initial state."""
    D, W = borders.final_shape
    C = x.shape[1]
    if states is None:
        states = x.new_zeros(D, C, W)
    rows = x.new_zeros(D * W, C)
    from_x, from_states = borders.final_tokens, borders.final_states
    rows = rows.index_copy(0, from_x.places, x.index_select(0, from_x.sources))
    if from_states.places.numel():
        before = states.to(x.dtype).transpose(1, 2).flatten(0, 1)  # [n_docs*W, C]
        rows = rows.index_copy(0, from_states.places, before.index_select(0, from_states.sources))
    return rows.unflatten(0, (D, W)).transpose(1, 2).contiguous()


class _Conv(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        x: Tensor,
        weight: Tensor,
        bias: Tensor | None,
        initial_states: Tensor | None,
        borders: Borders,
        activation: str | None,
    ) -> Tensor:
        y = convolve(x, weight, bias, initial_states, borders, activation)
        ctx.save_for_backward(x, weight, bias, initial_states)
        ctx.borders, ctx.activation = borders, activation
        return y

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, dy: Tensor) -> tuple[Tensor | None, ...]:
        x, weight, bias, initial_states = ctx.saved_tensors
        dx = torch.empty_like(x, memory_format=torch.contiguous_format)
        others = backward(x, weight, bias, initial_states, ctx.borders, ctx.activation, dy, dx)
        return (dx, *others, None, None)


def convolve(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    initial_states: Tensor | None,
    borders: Borders,
    activation: str | None,
) -> Tensor:
    """The forward pass, outside autograd."""
    dtype = WIDE[x.dtype]
    taps = weight.t().to(dtype).contiguous()  # [W, C]
    shift = None if bias is None else bias.to(dtype)
    y = torch.empty_like(x, memory_format=torch.contiguous_format)
    W = len(taps)
    activate_ = _silu_ if activation == "silu" else _identity
    for start, end in row_blocks(x.shape[0] - (W - 1), x.shape[1], x.device):
        rows = y[start + W - 1 : end + W - 1]
        inputs = x[start : end + W - 1].to(dtype)
        if y.dtype == dtype:
            activate_(sum_of_taps(inputs, taps, shift, out=rows))
        else:
            rows.copy_(activate_(sum_of_taps(inputs, taps, shift)))
    for _, heads, inputs in head_inputs(x, initial_states, borders, W):
        u = sum_of_taps(inputs, taps, shift).flatten(0, 1).index_select(0, heads.places)
        y.index_copy_(0, heads.sources, activate_(u).to(y.dtype))
    return y


def _silu_(u: Tensor) -> Tensor:
    return F.silu(u, inplace=True)


def _identity(u: Tensor) -> Tensor:
    return u
