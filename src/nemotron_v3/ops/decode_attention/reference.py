"""Attention of one token a slot to a cache of fixed size, as the equations say (README.md)."""

import math

import torch
from torch import Tensor


def decode_attention(
    qkv: Tensor,
    keys: Tensor,
    values: Tensor,
    positions: Tensor,
    active: Tensor,
    *,
    num_heads: int,
    num_kv_heads: int,
    scale: float | None = None,
    workspace: Tensor | None = None,
    out: Tensor | None = None,
    dtype: torch.dtype = torch.float64,
) -> Tensor:
    """The reference: one slot and one head after another, in `dtype`. Arguments: see `op.py`."""
    R, J, L, P = keys.shape
    share = num_heads // num_kv_heads
    factor: float = P**-0.5 if scale is None else scale
    y = torch.zeros(R, num_heads, P, dtype=dtype, device=qkv.device)
    for row in range(R):
        if not active[row]:
            continue
        position = int(positions[row])
        if not 0 <= position < L:
            y[row] = math.nan
            continue
        q, k, v = qkv[row].view(-1, P).split([num_heads, J, J])
        keys[row, :, position] = k.to(keys.dtype)
        values[row, :, position] = v.to(values.dtype)
        for h in range(num_heads):
            seen = (row, h // share, slice(position + 1))
            scores = factor * (keys[seen].to(dtype) @ q[h].to(dtype))
            y[row, h] = torch.softmax(scores, 0) @ values[seen].to(dtype)
    y = y.view(R, num_heads * P)
    return y if out is None else out.copy_(y)
