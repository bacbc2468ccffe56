"""Causal grouped-query attention over documents, in plain PyTorch.

Letters: T packed tokens, n documents of one length L, H query heads, J key/value heads, P head
width; B, S the grid.

Documents of equal length run as one batch of `scaled_dot_product_attention`, so that a pack never
needs a mask over all pairs of its tokens.
"""

from dataclasses import dataclass
from itertools import pairwise

import torch
import torch.nn.functional as F
from torch import Tensor

from nemotron_v3.layout import SequenceLayout
from nemotron_v3.layout.modes import on_device
from nemotron_v3.ops.common.long_attention import without_plans


def attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    *,
    layout: SequenceLayout,
    mask: Tensor | None = None,
    scale: float | None = None,
    dropout_p: float = 0.0,
) -> Tensor:
    q, k, v = (_aligned(t) for t in (q, k, v))
    if mask is not None:
        return _masked(q, k, v, layout, mask, scale, dropout_p)
    groups = layout.derived("attention", _Groups.of)
    parts = []
    for count, length, index in groups.batches:
        batch = [_take(t, index).unflatten(0, (count, length)).transpose(1, 2) for t in (q, k, v)]
        with without_plans(q):
            out = F.scaled_dot_product_attention(
                *batch,
                is_causal=length > 1,
                scale=scale,
                dropout_p=dropout_p,
                enable_gqa=_gqa(q, k),
            )
        parts.append(out.transpose(1, 2).flatten(0, 1))
    out = torch.cat(parts) if parts else torch.zeros_like(q)
    return out if groups.token_order is None else out.index_select(0, groups.token_order)


def _masked(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    layout: SequenceLayout,
    mask: Tensor,
    scale: float | None,
    dropout_p: float,
) -> Tensor:
    """A 4-D mask on the grid decides alone; a query with nothing to attend gives 0."""
    grid = [layout.unpack(t) for t in (q, k, v)]
    if len(layout.shape) == 1:
        grid = [t[None] for t in grid]
    attends = mask if mask.dtype == torch.bool else mask != float("-inf")
    some = attends.any(-1, keepdim=True)  # [B, 1, S, 1]
    # A softmax over nothing is 0/0: let such a query attend everything, and drop what it reads.
    mask = mask | ~some if mask.dtype == torch.bool else mask.to(q.dtype).masked_fill(~some, 0)
    with without_plans(q):
        out = F.scaled_dot_product_attention(
            *(t.transpose(1, 2) for t in grid),
            attn_mask=mask,
            scale=scale,
            dropout_p=dropout_p,
            enable_gqa=_gqa(q, k),
        )
    out = out.masked_fill(~some, 0).transpose(1, 2)
    return layout.pack(out[0] if len(layout.shape) == 1 else out)


def _aligned(t: Tensor) -> Tensor:
    """PyTorch's fused kernels read 16 bytes at a time from rows of any stride, and do not check:
    rows that start elsewhere give wrong numbers, or a fault of the device."""
    if not t.is_cuda:
        return t
    if torch.compiler.is_compiling():  # which cannot ask where a tensor begins
        return t.contiguous()
    starts = (t.storage_offset(), *t.stride()[:-1])
    step = 16 // t.element_size()
    return t.contiguous() if any(start % step for start in starts) else t


def _gqa(q: Tensor, k: Tensor) -> bool:
    return q.shape[1] != k.shape[1]


def _take(t: Tensor, index: Tensor | slice) -> Tensor:
    return t[index] if isinstance(index, slice) else t.index_select(0, index)


@dataclass(frozen=True)
class _Groups:
    """Documents by length, `(count, length, tokens)`, and each token's place in the result."""

    batches: tuple[tuple[int, int, Tensor | slice], ...]
    token_order: Tensor | None

    @classmethod
    def of(cls, layout: SequenceLayout) -> "_Groups":
        starts: dict[int, list[int]] = {}
        for start, length in zip(layout.offsets[:-1], layout.lengths, strict=True):
            if length:
                starts.setdefault(length, []).append(start)
        batches, places = [], []
        for length, firsts in starts.items():
            count = len(firsts)
            if all(b - a == length for a, b in pairwise(firsts)):
                where = slice(firsts[0], firsts[0] + count * length)
                tokens = torch.arange(where.start, where.stop, device=layout.device)
            else:
                of_rows = on_device(firsts, layout.device)[:, None]
                tokens = (of_rows + torch.arange(length, device=layout.device)).flatten()
                where = tokens
            places.append(tokens)
            batches.append((count, length, where))
        if not places:
            return cls((), None)
        in_order = all(a < b for a, b in pairwise(sum(starts.values(), [])))
        return cls(tuple(batches), None if in_order else torch.cat(places).argsort())
