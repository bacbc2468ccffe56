"""Cumulative offsets that count other tokens than those of a call, where it is known which.

Code that makes offsets once for all layers of a model hands the same to each: they may leave out
padding at the end, or count the whole sequence at a step that brings one token.
"""

from itertools import pairwise
from typing import Any

import torch
from torch import Tensor

from nemotron_v3.cache import NemotronHybridCache, held_by
from nemotron_v3.layout.checks import agreed, check_max_seqlen, grid_rows, grid_size, read_offsets

_OFFSETS = ("cu_seqlens", "cu_seqlens_q", "cu_seqlens_kv")
_LONGEST = ("max_seqlen", "max_seqlen_q", "max_seqlen_kv")


def offsets_of_this_call(
    layout_kwargs: dict[str, Any],
    shape: tuple[int, ...],
    mask: Tensor | None,
    cache: NemotronHybridCache | None,
    layer_idx: int | None = None,
    may_end_early: bool = False,
) -> dict[str, Any]:
    """Keyword arguments for `SequenceLayout.resolve` whose offsets count the tokens of the call.

    Args:
        layout_kwargs: as they were given.
        shape: the grid of the tokens.
        mask: their padding mask, or None.
        cache: what they follow, or None.
        layer_idx: the layer's number in the cache; None where it has no state there.
        may_end_early: whether the layer works token by token: then offsets may end early, and what
            follows is a document of its own.
    """
    given = agreed("cu_seqlens", *map(layout_kwargs.get, _OFFSETS))
    follows = cache is not None and cache.has_previous_state
    if given is None or layout_kwargs.get("cu_seqlens_padded") is not None:
        return layout_kwargs
    if not (follows or (may_end_early and mask is None)):
        return layout_kwargs
    offsets, total = read_offsets("cu_seqlens", given), grid_size(shape)
    if offsets[-1] == total:
        return layout_kwargs
    others = {k: v for k, v in layout_kwargs.items() if k not in (*_OFFSETS, *_LONGEST)}
    lengths = tuple(b - a for a, b in pairwise(offsets))
    longest = agreed("max_seqlen", *map(layout_kwargs.get, _LONGEST))
    if cache is not None and follows and lengths in _whole_sequences(shape, mask, cache, layer_idx):
        check_max_seqlen(longest, lengths)
        return others  # what the cache knows: one document a row, behind what that holds
    if may_end_early and mask is None and offsets[-1] < total:
        check_max_seqlen(longest, lengths)
        borders = range(shape[-1], total + 1, shape[-1])
        tail = [border for border in borders if border > offsets[-1]]
        return others | {"cu_seqlens": torch.tensor([*offsets, *tail], device=given.device)}
    return layout_kwargs


def _whole_sequences(
    shape: tuple[int, ...], mask: Tensor | None, cache: NemotronHybridCache, layer_idx: int | None
) -> list[tuple[int, ...]]:
    """Tokens of each row, what the cache holds of them included.

    A layer without a state there cannot tell whether the others have moved on: two answers.
    """
    rows = grid_rows(shape)
    new = [shape[-1]] * rows
    if mask is not None:
        new = (mask.detach().cpu() != 0).reshape(rows, -1).sum(1).tolist()
    held = {held_by(cache, layer_idx), cache.lengths}
    if layer_idx is not None:
        held = {held_by(cache, layer_idx)}
    fits = [lengths for lengths in held if len(lengths) == rows]
    return [tuple(a + n for a, n in zip(lengths, new, strict=True)) for lengths in fits]
