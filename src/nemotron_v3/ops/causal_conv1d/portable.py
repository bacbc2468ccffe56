"""Causal depthwise convolution in plain PyTorch.

Letters: T packed tokens, D documents, L tokens of a document, C channels, W taps.

Each document is written behind its state (the W inputs before it, zeros at a fresh start), so that
a tap is a shifted view and no border needs a mask.
"""

from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from nemotron_v3.layout import SequenceLayout
from nemotron_v3.ops._dispatch import wide


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
    W = weight.shape[1]
    states = initial_states
    if states is None:
        states = x.new_zeros(layout.num_documents, x.shape[1], W)
    states = states.to(x.dtype).transpose(1, 2)  # [D, W, C]
    if layout.uniform_length is not None:
        y, final = _uniform(x, states, weight, bias)
    else:
        y, final = _ragged(x, states, weight, bias, layout)
    if activation == "silu":
        y = F.silu(y)
    return y.to(x.dtype), final.transpose(1, 2).contiguous() if return_final_states else None


def _uniform(
    x: Tensor, states: Tensor, weight: Tensor, bias: Tensor | None
) -> tuple[Tensor, Tensor]:
    D, W, C = states.shape
    extended = torch.cat([states, x.view(D, -1, C) if x.numel() else x.view(D, 0, C)], dim=1)
    return _taps(extended, weight, bias).flatten(0, 1), extended[:, -W:]


def _ragged(
    x: Tensor, states: Tensor, weight: Tensor, bias: Tensor | None, layout: SequenceLayout
) -> tuple[Tensor, Tensor]:
    table = layout.derived(("causal_conv1d", W := weight.shape[1]), lambda it: _Table.of(it, W))
    extended = torch.cat([x, states.flatten(0, 1)]).index_select(0, table.extended)  # [T + D*W, C]
    y = _taps(extended[None], weight, bias)[0]  # [T + D*W - W, C]
    return y.index_select(0, table.outputs), extended[table.finals]


def _taps(extended: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    """`[..., W + n, C]` -> `[..., n, C]`: row i holds the sum over taps ending at row i + W."""
    W = weight.shape[1]
    n = extended.shape[1] - W
    dtype = wide(extended.dtype)
    extended, weight = extended.to(dtype), weight.to(dtype)
    y = extended[:, 1 : 1 + n] * weight[:, 0]
    for j in range(1, W):
        y = torch.addcmul(y, extended[:, 1 + j : 1 + j + n], weight[:, j])
    return y if bias is None else y + bias.to(dtype)


@dataclass(frozen=True)
class _Table:
    """Row numbers for documents of unequal length.

    `extended` `[T + D*W]`: the row of `cat(x, states)` at each place of the extended stream;
    `outputs` `[T]`: the row of the taps that belongs to each token; `finals` `[D, W]`: the places
    of the last W inputs of each document.
    """

    extended: Tensor
    outputs: Tensor
    finals: Tensor

    @classmethod
    def of(cls, layout: SequenceLayout, W: int) -> "_Table":
        extended, outputs, finals = [], [], []
        start = 0
        for document, length in enumerate(layout.lengths):
            state_row = layout.num_tokens + document * W
            extended.append(torch.arange(state_row, state_row + W))
            first = layout.offsets[document]
            extended.append(torch.arange(first, first + length))
            outputs.append(torch.arange(start, start + length))
            start += W + length
            finals.append(torch.arange(start - W, start))
        move = layout.device
        return cls(
            torch.cat(extended).to(move), torch.cat(outputs).to(move), torch.stack(finals).to(move)
        )
