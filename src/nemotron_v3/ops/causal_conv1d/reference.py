"""Depthwise causal convolution, one token after another (README.md).

T packed tokens, C channels, W conv width, n_docs documents.
"""

from typing import Literal

import torch
import torch.nn.functional as F
from torch import Tensor

from nemotron_v3.layout import SequenceLayout


def causal_conv1d(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    *,
    layout: SequenceLayout,
    activation: Literal["silu"] | None = "silu",
    initial_states: Tensor | None = None,
    return_final_states: bool = False,
    dtype: torch.dtype = torch.float64,
) -> tuple[Tensor, Tensor | None]:
    """`y_t = act(bias + sum_j weight[:, j] * x_{t-W+1+j})` inside each document.

    The window of the last W inputs is the state: it starts as `initial_states` (zeros without
    them), each token pushes itself in at the end, and what is left after the last token is the
    final state. A document without tokens passes its state through.

    Args:
        x: `[T, C]`.
        weight: `[C, W]`; the last tap meets the current token.
        bias: `[C]` or None.
        layout: where documents start; only `layout.lengths` is read.
        activation: `"silu"` or None.
        initial_states: `[n_docs, C, W]`, the W inputs before each document, newest last.
        return_final_states: whether the second result is wanted.
        dtype: what everything is computed and returned in; float64 is the truth.

    Returns:
        y `[T, C]` and the final states `[n_docs, C, W]` or None, both in `dtype`.
    """
    x, weight = x.to(dtype), weight.to(dtype)
    bias = None if bias is None else bias.to(dtype)
    channels, width = weight.shape
    tokens = iter(x.unbind(0))
    outputs, final_states = [], []
    for document, length in enumerate(layout.lengths):
        if initial_states is None:
            window = x.new_zeros(channels, width)
        else:
            window = initial_states[document].to(dtype)
        for _ in range(length):
            window = torch.cat([window[:, 1:], next(tokens)[:, None]], dim=1)
            y_t = (weight * window).sum(dim=1)
            if bias is not None:
                y_t = y_t + bias
            outputs.append(F.silu(y_t) if activation == "silu" else y_t)
        final_states.append(window)
    y = torch.stack(outputs) if outputs else x
    if not return_final_states:
        return y, None
    return y, torch.stack(final_states) if final_states else x.new_zeros(0, channels, width)
