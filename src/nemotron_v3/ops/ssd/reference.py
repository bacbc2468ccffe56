"""The selective state space of Mamba-2, one token after another (README.md).

T packed tokens, H heads, P head width, G groups, N state, n_docs documents.
"""

import math

import torch
import torch.nn.functional as F
from torch import Tensor

from nemotron_v3.layout import SequenceLayout


def ssd(
    x: Tensor,
    dt: Tensor,
    A: Tensor,
    B: Tensor,
    C: Tensor,
    *,
    D: Tensor | None = None,
    dt_bias: Tensor | None = None,
    dt_limit: tuple[float, float] = (0.0, math.inf),
    layout: SequenceLayout,
    chunk_size: int = 128,
    initial_states: Tensor | None = None,
    return_final_states: bool = True,
    dtype: torch.dtype = torch.float64,
) -> tuple[Tensor, Tensor | None]:
    """`S_t = exp(dt_t A) S_{t-1} + dt_t x_t (x) B_t` and `y_t = S_t C_t + D x_t` in each document.

    A document starts from its initial state (zeros without one) and ends in its final state; a
    document without tokens passes its state through.

    Args:
        x: `[T, H, P]`.
        dt: `[T, H]`, before the bias, softplus and clamp: `clamp(softplus(dt + dt_bias), dt_limit)`
            is the step.
        A: `[H]`, negative.
        B, C: `[T, G, N]`; head h reads group `h // (H / G)`.
        D, dt_bias: `[H]` or None.
        dt_limit: smallest and largest step.
        layout: where documents start; only `layout.lengths` is read.
        chunk_size: no effect: it changes the rounding of other forms, never the mathematics.
        initial_states: `[n_docs, H, P, N]` or None.
        return_final_states: whether the second result is wanted.
        dtype: what everything is computed and returned in; float64 is the truth.

    Returns:
        y `[T, H, P]` and the final states `[n_docs, H, P, N]` or None, both in `dtype`.
    """
    x, dt, A, B, C = (tensor.to(dtype) for tensor in (x, dt, A, B, C))
    D, dt_bias, initial_states = (
        None if tensor is None else tensor.to(dtype) for tensor in (D, dt_bias, initial_states)
    )
    heads, head_dim, state = x.shape[1], x.shape[2], B.shape[2]
    dt = F.softplus(dt if dt_bias is None else dt + dt_bias).clamp(*dt_limit)
    B, C = (tensor.repeat_interleave(heads // tensor.shape[1], dim=1) for tensor in (B, C))

    tokens = zip(x.unbind(0), dt.unbind(0), B.unbind(0), C.unbind(0), strict=True)
    outputs, final_states = [], []
    for document, length in enumerate(layout.lengths):
        if initial_states is None:
            S = x.new_zeros(heads, head_dim, state)
        else:
            S = initial_states[document]
        for _ in range(length):
            x_t, dt_t, B_t, C_t = next(tokens)  # [H, P], [H], [H, N], [H, N]
            # The outer product and S_t C_t are written as matrix products because that is what
            # every fast form makes of them, and where "operands rounded to bf16" takes hold.
            update = (dt_t[:, None] * x_t)[:, :, None] @ B_t[:, None, :]  # [H, P, N]
            S = torch.exp(dt_t * A)[:, None, None] * S + update
            y_t = (S @ C_t[:, :, None])[:, :, 0]  # [H, P]
            outputs.append(y_t if D is None else y_t + D[:, None] * x_t)
        final_states.append(S)
    y = torch.stack(outputs) if outputs else x
    if not return_final_states:
        return y, None
    if not final_states:
        return y, x.new_zeros(0, heads, head_dim, state)
    return y, torch.stack(final_states)
