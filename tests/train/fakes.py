"""Rows of a step made up on the spot: a function of the seed and the step."""

from collections.abc import Iterator
from typing import Any

import torch

from nemotron_v3.data.options import DataOptions, Source
from nemotron_v3.data.pieces import PackedRow
from nemotron_v3.data.report import DataReport

VOCAB = 97


class MadeUp:
    """Rows of two documents and some padding; counting up, so that there is something to learn."""

    def __init__(self, options: DataOptions, tokenizer: Any, rank: int = 0, world_size: int = 1):
        self.options, self.rank, self.world_size = options, rank, world_size
        self.step = 0
        self.largest_token = VOCAB - 1

    def total_steps(self, at_most: int | None = None) -> int | None:
        there = None if self.options.epochs is None else round(10 * self.options.epochs)
        return there if there is None or at_most is None else min(there, at_most)

    def row(self, number: int) -> PackedRow:
        T = self.options.tokens_per_row
        generator = torch.Generator().manual_seed(1000 * self.options.seed + number)
        start, cut = torch.randint(3, T - 6, (2,), generator=generator).tolist()
        used = T - 2
        ids = (torch.arange(T) + start) % VOCAB
        labels = ids.clone()
        labels[[0, cut]] = -100
        labels[used:] = -100
        return PackedRow(ids, labels, [0, cut, used], [(0, number), (0, number)])

    def __iter__(self) -> Iterator[list[PackedRow]]:
        rows = self.options.rows
        end = self.total_steps()
        while end is None or self.step < end:
            first = self.step * rows
            self.step += 1
            each = -(-rows // self.world_size)
            mine = [self.rank + i * self.world_size for i in range(each)]
            yield [self.row(first + r) if r < rows else self.empty() for r in mine]

    def empty(self) -> PackedRow:
        ids = torch.zeros(self.options.tokens_per_row, dtype=torch.int64)
        return PackedRow(ids, torch.full_like(ids, -100), [0], [])

    def report(self) -> DataReport:
        return DataReport(())

    def state_dict(self) -> dict[str, Any]:
        return {"rows": self.step * self.options.rows}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self.step = state["rows"] // self.options.rows


def made_up_options(**changes: Any) -> DataOptions:
    told = {"sources": (Source("made up"),), "tokens_per_row": 32, "rows": 4, "epochs": None}
    return DataOptions(**told | changes)
