"""The new tokens of one forward pass as the cache sees them: which each row gets, and where."""

from dataclasses import dataclass
from functools import cached_property
from operator import add

import torch
from torch import Tensor

from nemotron_v3.layout import SequenceLayout
from nemotron_v3.layout.modes import outside_inference_mode


@dataclass(frozen=True)
class Step:
    """The tokens that one forward pass adds; document r of the layout belongs to row r.

    Attributes:
        layout: of the new tokens, packed.
        starts: tokens each row held before, on the host.
        positions: int64 `[rows]`, the same on the device.
        window: how many of each row's last tokens go one by one, so that the states before each of
            them can be kept.
    """

    layout: SequenceLayout
    starts: tuple[int, ...]
    positions: Tensor
    window: int = 0

    @property
    def lengths(self) -> tuple[int, ...]:
        """New tokens of each row."""
        return self.layout.lengths

    @cached_property
    def ends(self) -> tuple[int, ...]:
        """Tokens each row holds afterwards."""
        return tuple(map(add, self.starts, self.layout.lengths))

    @cached_property
    def uniform(self) -> tuple[int, int] | None:
        """`(start, length)` where all rows share them, else None."""
        pairs = set(zip(self.starts, self.layout.lengths, strict=True))
        return next(iter(pairs)) if len(pairs) == 1 else None

    @cached_property
    @outside_inference_mode  # layers of one step may be called in several modes
    def places(self) -> tuple[Tensor, Tensor]:
        """int64 `[T]` each: the row of every new token, and its position in the row."""
        rows = self.layout.seq_idx.long()
        first = self.layout.cu_seqlens[:-1] - self.positions
        tokens = torch.arange(self.layout.num_tokens, device=self.layout.device)
        return rows, tokens - first.index_select(0, rows)

    @cached_property
    @outside_inference_mode
    def pieces(self) -> tuple["Piece", ...]:
        """The step cut for a rollback window: the bulk of each row, then the last tokens singly."""
        heads = [max(0, length - self.window) for length in self.lengths]
        pieces = [_piece(self, [0] * len(heads), heads)] if any(heads) else []
        for k in range(min(self.window, max(self.lengths))):
            firsts = [head + k for head in heads]
            counts = [int(first < n) for first, n in zip(firsts, self.lengths, strict=True)]
            pieces.append(_piece(self, firsts, counts))
        return tuple(pieces)

    @cached_property
    @outside_inference_mode
    def piece_order(self) -> Tensor:
        """int64 `[T]`: the place of each token among the pieces' tokens."""
        return torch.cat([piece.tokens for piece in self.pieces]).argsort()


@dataclass(frozen=True)
class Piece:
    """Some tokens of a step.

    Attributes:
        layout: of these tokens; a row that takes no part has length 0.
        tokens: int64, their places among the step's packed tokens.
        rows: int64 `[n]`, the rows whose present state is to be kept first.
        positions: int64 `[n]`, the positions these rows are at.
    """

    layout: SequenceLayout
    tokens: Tensor
    rows: Tensor
    positions: Tensor


def _piece(step: Step, firsts: list[int], counts: list[int]) -> Piece:
    """`counts[r]` tokens of each row r from its `firsts[r]`-th new one on."""
    device = step.layout.device
    taking_part = [row for row, count in enumerate(counts) if count]
    offsets = step.layout.offsets
    tokens = [
        torch.arange(
            offsets[row] + firsts[row], offsets[row] + firsts[row] + counts[row], device=device
        )
        for row in taking_part
    ]
    positions = [step.starts[row] + firsts[row] for row in taking_part]
    return Piece(
        SequenceLayout.from_lengths(counts, device),
        torch.cat(tokens),
        torch.tensor(taking_part, device=device),
        torch.tensor(positions, device=device),
    )
