"""Causal grouped-query attention over documents, by PyTorch's flex attention.

Letters: T packed tokens, H query heads, J key/value heads, P head width, Q tokens of a block, b
blocks (T / Q, rounded up).

The pack is one sequence. A block mask says which pairs of blocks hold a pair of tokens that may
meet; it is worked out from the documents' borders block by block, never from all pairs of tokens.
"""

import functools
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from nemotron_v3.layout import SequenceLayout

BLOCK = 128  # flex attention's own default


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
    _check(q, k, v, mask, dropout_p)
    if q.shape[0] == 0:
        return torch.zeros_like(q)
    out = _flex_attention(q.device.type)(
        *(t.transpose(0, 1)[None] for t in (q, k, v)),  # [1, H, T, P]
        block_mask=layout.derived("flex_attention", block_mask),
        scale=scale,
        enable_gqa=q.shape[1] != k.shape[1],
    )
    return out[0].transpose(0, 1)


def block_mask(layout: SequenceLayout) -> Any:
    """The `BlockMask` of causal attention inside the documents of a pack."""
    from torch.nn.attention.flex_attention import BlockMask

    T, document = layout.num_tokens, layout.seq_idx
    first = torch.arange(0, T, BLOCK, device="cpu")  # [b], the first token of each block
    last = (first + BLOCK - 1).clamp(max=T - 1)
    starts = torch.tensor(layout.offsets, device="cpu")
    # Where the document of a block's first, and of its last, token begins.
    begin = starts[torch.searchsorted(starts, first, right=True) - 1]
    begin_of_last = starts[torch.searchsorted(starts, last, right=True) - 1]

    blocks = torch.arange(len(first), device="cpu")
    row, column = blocks[:, None], blocks[None, :]
    meets = (column <= row) & (column >= begin[:, None] // BLOCK)
    # Everything in it may meet: strictly before the diagonal, and both blocks in one document.
    one_document = (begin == begin_of_last) & (last - first == BLOCK - 1)
    full = meets & (column < row) & one_document[:, None] & (first[None, :] >= begin[:, None])

    def may_attend(batch: Tensor, head: Tensor, query: Tensor, key: Tensor) -> Tensor:
        return (query >= key) & (document[query] == document[key])

    device = layout.device
    counts, columns = _ordered(meets & ~full, device)
    full_counts, full_columns = _ordered(full, device)
    return BlockMask.from_kv_blocks(
        counts, columns, full_counts, full_columns, BLOCK, may_attend, seq_lengths=(T, T)
    )


def _ordered(chosen: Tensor, device: torch.device) -> tuple[Tensor, Tensor]:
    """How many columns each row of `[b, b]` chooses, and their numbers, the chosen first."""
    counts = chosen.sum(1, dtype=torch.int32)
    columns = (~chosen).to(torch.int8).argsort(dim=1, stable=True).to(torch.int32)
    return counts[None, None].to(device), columns[None, None].to(device)


@functools.cache
def _flex_attention(device_type: str) -> Callable[..., Tensor]:
    """Compiled where that makes one kernel of it; a CPU runs it as it is, without a compiler."""
    from torch.nn.attention.flex_attention import flex_attention

    return flex_attention if device_type == "cpu" else torch.compile(flex_attention)


def _check(q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None, dropout_p: float) -> None:
    training = torch.is_grad_enabled() and any(t.requires_grad for t in (q, k, v))
    if training and q.device.type == "cpu":
        raise RuntimeError(
            "flex attention has no backward pass on a CPU: use BackendConfig(attn='sdpa') to "
            "train there, or torch.no_grad() for inference"
        )
    if mask is not None:
        raise ValueError(
            f"attn='flex' takes its mask from the layout, not a 4-D attention_mask (got one of "
            f"shape {tuple(mask.shape)}): use BackendConfig(attn='sdpa')"
        )
    if dropout_p:
        raise ValueError(
            f"attn='flex' has no dropout (attention_dropout is {dropout_p}): set it to 0, or use "
            "BackendConfig(attn='sdpa')"
        )
