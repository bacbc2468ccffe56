"""Rows of packed documents as what the model is called with."""

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import pairwise
from typing import Any

import torch
from torch import Tensor

from nemotron_v3.data.pieces import PackedRow
from nemotron_v3.layout import SequenceLayout
from nemotron_v3.model.loss import IGNORE_INDEX


@dataclass(frozen=True)
class Batch:
    """Documents one after the other, on the device.

    `input_ids` and `labels` are int64 `[T]`; `targets` is how many tokens are predicted.
    """

    input_ids: Tensor
    labels: Tensor
    layout: SequenceLayout
    targets: int

    def arguments(self) -> dict[str, Any]:
        """Of the model."""
        return {"input_ids": self.input_ids, "labels": self.labels, "layout": self.layout}


def make_batches(
    rows: Sequence[PackedRow], rows_per_pass: int, device: torch.device
) -> list[Batch]:
    """The rows of a process in one step, so many of them in each batch, without their padding."""
    rows = [row for row in rows if row.cu_seqlens[-1]]
    groups = (rows[i : i + rows_per_pass] for i in range(0, len(rows), rows_per_pass))
    return [_join(group, device) for group in groups]


def empty_batch(device: torch.device) -> Batch:
    """A pass that predicts nothing, for a process that has fewer rows than another."""
    ids = torch.zeros(2, dtype=torch.int64, device=device)
    labels = torch.full_like(ids, IGNORE_INDEX)
    return Batch(ids, labels, SequenceLayout.from_lengths([2], device), 0)


def _join(rows: Sequence[PackedRow], device: torch.device) -> Batch:
    lengths = [end - start for row in rows for start, end in pairwise(row.cu_seqlens)]
    ids = torch.cat([row.input_ids[: row.cu_seqlens[-1]] for row in rows])
    labels = torch.cat([row.labels[: row.cu_seqlens[-1]] for row in rows])
    targets = sum(row.num_targets for row in rows)
    if device.type == "cuda":  # copied while the host goes on
        ids, labels = ids.pin_memory(), labels.pin_memory()
    ids, labels = ids.to(device, non_blocking=True), labels.to(device, non_blocking=True)
    layout = SequenceLayout.from_lengths([n for n in lengths if n], device)
    return Batch(ids, labels, layout, targets)


def mean_square_length(layout: SequenceLayout) -> float:
    """The length that attention's cost is that of: sum of squares over sum."""
    return sum(n * n for n in layout.lengths) / max(1, sum(layout.lengths))
