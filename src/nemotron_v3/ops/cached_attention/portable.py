"""Attention of new tokens to everything their row holds, in plain PyTorch. Letters: see `op.py`."""

import torch
import torch.nn.functional as F
from torch import Tensor

from nemotron_v3.layout import SequenceLayout
from nemotron_v3.layout.modes import on_device
from nemotron_v3.ops.common import attention_blocks as blocks
from nemotron_v3.ops.common.long_attention import without_plans


def cached_attention(
    q: Tensor,
    keys: Tensor,
    values: Tensor,
    *,
    layout: SequenceLayout,
    starts: tuple[int, ...],
    positions: Tensor,
    scale: float | None = None,
) -> Tensor:
    if layout.uniform_length == 1:
        return _decode(q, keys, values, starts, positions, scale)
    groups: dict[tuple[int, int], list[int]] = {}
    for row, pair in enumerate(zip(starts, layout.lengths, strict=True)):
        if pair[1]:
            groups.setdefault(pair, []).append(row)
    out = torch.empty_like(q)
    if len(groups) == 1 and len(next(iter(groups.values()))) == len(starts):
        (start, length), rows = next(iter(groups.items()))
        return _group(q, keys, values, start, length, scale)
    parts, places = [], []
    for (start, length), rows in groups.items():
        firsts = on_device([layout.offsets[row] for row in rows], q.device)
        tokens = firsts[:, None] + torch.arange(length, device=q.device)
        places.append(tokens.flatten())
        index = on_device(rows, q.device)
        k, v = keys.index_select(0, index), values.index_select(0, index)
        parts.append(_group(q.index_select(0, places[-1]), k, v, start, length, scale))
    if not parts:
        return out
    return torch.cat(parts).index_select(0, torch.cat(places).argsort())


def _group(
    q: Tensor, keys: Tensor, values: Tensor, start: int, length: int, scale: float | None
) -> Tensor:
    """Rows that hold `start` tokens and get `length`: the mask is causal, aligned at the end."""
    # Imported here: it loads triton where that is installed.
    from torch.nn.attention.bias import causal_lower_right

    total = start + length
    if start and length > 1 and len(keys) == 1 and blocks.takes(q):
        # No mask over all pairs of tokens, of which a CPU would make a tensor.
        k, v = (t[0, :, :total].transpose(0, 1) for t in (keys, values))
        return blocks.attend_after(q, k, v, scale)
    batch = q.unflatten(0, (-1, length)).transpose(1, 2)
    with without_plans(q):
        out = F.scaled_dot_product_attention(
            batch,
            keys[:, :, :total],
            values[:, :, :total],
            attn_mask=causal_lower_right(length, total) if start and length > 1 else None,
            is_causal=start == 0 and length > 1,
            scale=scale,
            enable_gqa=q.shape[1] != keys.shape[1],
        )
    return out.transpose(1, 2).flatten(0, 1)


def _decode(
    q: Tensor,
    keys: Tensor,
    values: Tensor,
    starts: tuple[int, ...],
    positions: Tensor,
    scale: float | None,
) -> Tensor:
    """One token a row; rows of different lengths are told apart by a mask over the keys."""
    mask = None
    if len(set(starts)) > 1:
        place = torch.arange(keys.shape[2], device=q.device)
        mask = (place <= positions[:, None])[:, None, None]
    with without_plans(q):
        out = F.scaled_dot_product_attention(
            q[:, :, None],
            keys,
            values,
            attn_mask=mask,
            scale=scale,
            enable_gqa=q.shape[1] != keys.shape[1],
        )
    return out[:, :, 0]
