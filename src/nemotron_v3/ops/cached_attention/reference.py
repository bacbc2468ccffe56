"""Attention of new tokens to everything their row holds, as the equations say. Letters: `op.py`."""

import torch
from torch import Tensor

from nemotron_v3.layout import SequenceLayout


def cached_attention(
    q: Tensor,
    keys: Tensor,
    values: Tensor,
    *,
    layout: SequenceLayout,
    starts: tuple[int, ...],
    positions: Tensor,
    scale: float | None = None,
    dtype: torch.dtype = torch.float64,
) -> Tensor:
    """The reference: one token and one head after another, in `dtype`."""
    T, H, P = q.shape
    share = H // keys.shape[1]
    scale = float(P**-0.5) if scale is None else scale
    rows = []
    for row, length in enumerate(layout.lengths):
        for i in range(length):
            query = q[layout.offsets[row] + i].to(dtype)
            seen = starts[row] + i + 1
            heads = []
            for h in range(H):
                k = keys[row, h // share, :seen].to(dtype)
                v = values[row, h // share, :seen].to(dtype)
                heads.append(torch.softmax(scale * (k @ query[h]), 0) @ v)
            rows.append(torch.stack(heads))
    return torch.stack(rows) if rows else q.to(dtype)
