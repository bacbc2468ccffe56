"""Softmax attention with shared key/value heads, scores written out (README.md).

T packed tokens, B rows of the grid, S positions of a document or of a row, H query heads, J
key/value heads, P head width.
"""

import math

import torch
import torch.nn.functional as F
from torch import Tensor

from nemotron_v3.layout import SequenceLayout


def attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    *,
    layout: SequenceLayout,
    mask: Tensor | None = None,
    scale: float | None = None,
    dropout_p: float = 0.0,
    dtype: torch.dtype = torch.float64,
) -> Tensor:
    """Each token attends to its own document up to itself, or to what `mask` allows.

    Args:
        q: `[T, H, P]`.
        k, v: `[T, J, P]`; query head h reads key/value head `h // (H / J)`.
        layout: where documents start.
        mask: `[B or 1, 1 or H, S, S]` on the layout's grid, bool (True = attend) or additive; it
            alone decides.
        scale: of the scores; None is `P ** -0.5`.
        dropout_p: probability that an attention weight is dropped (and the others scaled up).
        dtype: what everything is computed and returned in; float64 is the truth.

    Returns:
        `[T, H, P]` in `dtype`; 0 for a token that may attend to nothing.
    """
    q, k, v = q.to(dtype), k.to(dtype), v.to(dtype)
    heads, head_dim = q.shape[1], q.shape[2]
    k, v = (tensor.repeat_interleave(heads // tensor.shape[1], dim=1) for tensor in (k, v))
    scale = float(head_dim**-0.5) if scale is None else scale

    if mask is None:
        lengths = list(layout.lengths)
        documents = zip(q.split(lengths), k.split(lengths), v.split(lengths), strict=True)
        rows = []
        for q_d, k_d, v_d in documents:
            future = q.new_ones(len(q_d), len(q_d), dtype=torch.bool).triu(1)
            bias = q.new_zeros(future.shape).masked_fill(future, -math.inf)[None]
            rows.append(_attend(q_d, k_d, v_d, bias, scale, dropout_p))
        return torch.cat(rows) if rows else q

    if mask.dtype == torch.bool:
        bias = q.new_zeros(mask.shape).masked_fill(~mask, -math.inf)
    else:
        bias = mask.to(dtype)
    # A grid without a batch dimension is one row.
    row_shape = (layout.shape[-1], heads, head_dim)
    grid = [layout.unpack(tensor).reshape(-1, *row_shape) for tensor in (q, k, v)]
    bias = bias.expand(len(grid[0]), -1, -1, -1)
    rows = [
        _attend(q_b, k_b, v_b, bias_b, scale, dropout_p)
        for q_b, k_b, v_b, bias_b in zip(*grid, bias, strict=True)
    ]
    return layout.pack(torch.stack(rows).reshape(*layout.shape, heads, head_dim))


def _attend(
    q: Tensor, k: Tensor, v: Tensor, bias: Tensor, scale: float, dropout_p: float
) -> Tensor:
    """`softmax(scale q k^T + bias) v`: q, k, v `[S, H, P]`, bias `[1 or H, S, S]`, -inf = never."""
    scores = scale * torch.einsum("qhp,khp->hqk", q, k) + bias
    nothing = (bias == -math.inf).all(dim=-1, keepdim=True)
    weights = torch.softmax(scores.masked_fill(nothing, 0.0), dim=-1).masked_fill(nothing, 0.0)
    weights = F.dropout(weights, dropout_p)
    return torch.einsum("hqk,khp->qhp", weights, v)
