"""Attention of new tokens to what their row holds where a mask says which of it. Letters: `op.py`.

Every row holds equally many tokens and gets S: places are columns of the mask.
"""

import math

import torch
import torch.nn.functional as F
from torch import Tensor

from nemotron_v3.layout import SequenceLayout
from nemotron_v3.ops.common.long_attention import without_plans


def check_mask(mask: Tensor, q: Tensor, layout: SequenceLayout, starts: tuple[int, ...]) -> None:
    """Raises ValueError unless a mask is `[rows or 1, 1 or H, S, start + S]` for equal rows."""
    if layout.uniform_length is None or len(set(starts)) > 1:
        raise ValueError(
            f"a 4-D mask needs rows of equally many tokens: they hold {list(starts)} and get "
            f"{list(layout.lengths)}; give a padding mask, which may differ by row"
        )
    rows, S = len(starts), layout.uniform_length
    fits = (
        mask.dim() == 4
        and mask.shape[0] in (1, rows)
        and mask.shape[1] in (1, q.shape[1])
        and mask.shape[2] == S
    )
    if not fits or mask.shape[3] != starts[0] + S:
        raise ValueError(
            f"attention_mask has shape {tuple(mask.shape)}: behind {starts[0]} tokens of the "
            f"cache, {S} new ones need ({rows}, 1, {S}, {starts[0] + S}); or give a padding mask"
        )
    if mask.dtype != torch.bool and not mask.is_floating_point():
        raise ValueError(
            f"a 4-D attention_mask is bool (True = attend) or additive floats, got {mask.dtype}"
        )


def portable(
    q: Tensor,
    keys: Tensor,
    values: Tensor,
    *,
    mask: Tensor,
    layout: SequenceLayout,
    scale: float | None = None,
) -> Tensor:
    places = mask.shape[3]
    attends = mask if mask.dtype == torch.bool else mask != -math.inf
    some = attends.any(-1, keepdim=True)  # [rows or 1, 1 or H, S, 1]
    # A softmax over nothing is 0/0: let such a query attend everything, and drop what it reads.
    mask = mask | ~some if mask.dtype == torch.bool else mask.to(q.dtype).masked_fill(~some, 0)
    length = layout.uniform_length
    assert length is not None, "a mask over what is held needs rows of one length"
    with without_plans(q):
        out = F.scaled_dot_product_attention(
            q.unflatten(0, (-1, length)).transpose(1, 2),
            keys[:, :, :places],
            values[:, :, :places],
            attn_mask=mask,
            scale=scale,
            enable_gqa=q.shape[1] != keys.shape[1],
        )
    return out.masked_fill(~some, 0).transpose(1, 2).flatten(0, 1)


def reference(
    q: Tensor,
    keys: Tensor,
    values: Tensor,
    *,
    mask: Tensor,
    layout: SequenceLayout,
    scale: float | None = None,
    dtype: torch.dtype = torch.float64,
) -> Tensor:
    """One token and one head after another, in `dtype`; 0 for a token that may attend nothing."""
    T, H, P = q.shape
    S, places = mask.shape[2:]
    scale = float(P**-0.5) if scale is None else scale
    bias = mask.to(dtype)
    if mask.dtype == torch.bool:
        bias = torch.zeros(mask.shape, dtype=dtype, device=q.device).masked_fill(~mask, -math.inf)
    bias = bias.expand(T // S, H, S, places)
    tokens = []
    for row in range(T // S):
        for i in range(S):
            heads = []
            for h in range(H):
                k, v = (t[row, h * keys.shape[1] // H, :places].to(dtype) for t in (keys, values))
                seen = bias[row, h, i]
                scores = scale * (k @ q[row * S + i, h].to(dtype)) + seen
                nothing = bool((seen == -math.inf).all())
                heads.append(0 * v[0] if nothing else torch.softmax(scores, 0) @ v)
            tokens.append(torch.stack(heads))
    return torch.stack(tokens) if tokens else q.to(dtype)
