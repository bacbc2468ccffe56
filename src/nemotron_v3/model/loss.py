"""Which token predicts which label, and what the sum of their losses is divided by.

Letters: B batch rows, S sequence length, T packed tokens.

A label stands at the place of its own token, and the real token before it predicts it: the one
before it in its document, or for a label at padding the one that stands right in front. So an end
token behind the text can be a target although the mask hides it. A label that padding would have to
predict is an error, except in a row without a real token, which only fills up a batch.
"""

from numbers import Real
from typing import Any

import torch
from torch import Tensor

from nemotron_v3 import ops
from nemotron_v3.layers import graph_ops
from nemotron_v3.layout import SequenceLayout

IGNORE_INDEX = -100


def targets_of(labels: Tensor, layout: SequenceLayout) -> Tensor:
    """`[T]`: what each packed token predicts, -100 for nothing.

    Args:
        labels: integers on the layout's grid.
        layout: where the documents lie.
    """
    of_graph = graph_ops.can_take(layout)
    targets = (graph_ops if of_graph else ops).shift_labels(labels, layout)
    if layout.token_index is None:
        return targets
    return _with_padding(labels, layout, targets)[0]


def stray_label(labels: Tensor, layout: SequenceLayout, shifted: bool = False) -> Tensor | None:
    """Whether a label counts that no real token predicts: a scalar on the device, unread.

    Args:
        labels: integers on the layout's grid.
        layout: where the documents lie.
        shifted: each label stands at the token that predicts it.

    Returns:
        None where the layout has no padding.
    """
    if layout.token_index is None:
        return None
    stray = _strays(labels, layout, shifted).any()
    if shifted:
        return stray
    _, twice = _with_padding(labels, layout, ops.shift_labels(labels, layout))
    return stray | twice.any()


def refuse_stray_label(labels: Tensor, layout: SequenceLayout, shifted: bool = False) -> None:
    """Raises ValueError for a label that no real token predicts; waits for a GPU to know.

    It belongs where the layout was just made of a mask, which is read as well: the second read
    finds nothing to wait for.
    """
    stray = stray_label(labels, layout, shifted)
    if stray is None or stray.is_meta or not bool(stray):
        return
    strays = _strays(labels, layout, shifted).nonzero()
    if not len(strays):
        raise ValueError(
            "a token stands before padding and goes on behind it, and labels count at both places: "
            "it predicts one of them; give -100 at padding"
        )
    row, column = strays[0].tolist()
    value = int(labels.reshape(-1, layout.shape[-1])[row, column])
    place = f"row {row}, column {column}" if len(layout.shape) == 2 else f"token {column}"
    raise ValueError(
        f"the label at {place} is {value}, and padding would have to predict it: give -100 "
        "there. Labels at padding count right behind a real token alone"
    )


def check_items(items: Any) -> None:
    """Raises TypeError or ValueError unless `num_items_in_batch` is a number of targets."""
    if items is None:
        return
    if isinstance(items, Tensor):
        if items.numel() != 1 or items.is_complex() or items.dtype == torch.bool:
            raise TypeError(
                f"num_items_in_batch is {items.dtype} of shape {tuple(items.shape)}: give one "
                "number"
            )
    elif isinstance(items, bool) or not isinstance(items, Real):
        raise TypeError(f"num_items_in_batch is {items!r}: give a number, or a tensor of one")
    elif not 0 <= float(items) < 2**62:
        raise ValueError(f"num_items_in_batch is {items}: give the number of targets")


def per_item(mean: Tensor, targets: Tensor, items: Tensor | float | None) -> Tensor:
    """The mean over targets, or with `items` their sum divided by it (gradient accumulation).

    Args:
        mean: a scalar, 0 where nothing counts.
        targets: `[...]`, -100 where nothing counts.
        items: the targets of all the parts; None means those here.
    """
    if items is None:
        return mean
    count = (targets != IGNORE_INDEX).sum().to(mean)
    if isinstance(items, Tensor):
        items = items.to(mean.device).reshape(())
    # Where nothing counts anywhere, 0 / 0 would take the place of 0.
    return mean * torch.where(count > 0, count / items, count).to(mean.dtype)


def _with_padding(labels: Tensor, layout: SequenceLayout, targets: Tensor) -> tuple[Tensor, Tensor]:
    """Targets with the labels at padding right behind a token; where a token would have two."""
    places, at_padding = layout.derived("the places behind tokens", _behind)
    behind = labels.flatten().index_select(0, places)
    counts = at_padding & (behind != IGNORE_INDEX)
    return torch.where(counts, behind, targets), counts & (targets != IGNORE_INDEX)


def _strays(labels: Tensor, layout: SequenceLayout, shifted: bool) -> Tensor:
    """Bool `[B, S]`: labels that count and that only padding could predict."""
    real = layout.derived("real places", _real_places)  # [B, S]
    none = torch.zeros_like(real[:, :1])
    labels = labels.reshape(real.shape)
    if shifted:  # the label of a document's first token stands at the place before it
        predicted = real | torch.cat([real[:, 1:], none], 1)
    else:  # a row's first label is nobody's target
        predicted = real | torch.cat([~none, real[:, :-1]], 1)
    return (labels != IGNORE_INDEX) & ~predicted & real.any(1, keepdim=True)


def _real_places(layout: SequenceLayout) -> Tensor:
    """Bool `[B, S]`, True at real tokens; one row without a batch dimension."""
    assert layout.token_index is not None  # the grid holds padding
    size = torch.Size(layout.shape).numel()
    real = torch.zeros(size, dtype=torch.bool, device=layout.device)
    return real.index_fill_(0, layout.token_index, True).view(-1, max(1, layout.shape[-1]))


def _behind(layout: SequenceLayout) -> tuple[Tensor, Tensor]:
    """The place behind each packed token `[T]`, and whether it is padding of the same row `[T]`."""
    assert layout.token_index is not None  # the grid holds padding
    real, S = _real_places(layout), layout.shape[-1]
    last = layout.token_index % S == S - 1
    places = layout.token_index + (~last).long()
    return places, ~real.flatten().index_select(0, places)
