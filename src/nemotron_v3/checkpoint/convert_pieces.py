"""Tensors of a checkpoint as they are written: read from the file a block at a time.

Letters: O rows of a weight (its outputs), I columns (its inputs), r rank of an adapter.
"""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from typing import Protocol

import torch
from torch import Tensor

from nemotron_v3.checkpoint.errors import CheckpointError
from nemotron_v3.checkpoint.narrow.layouts import StoredNarrow
from nemotron_v3.checkpoint.narrow.read import row_blocks
from nemotron_v3.checkpoint.writer import blocks, same_bits

BLOCK = 2**20  # elements handled at once: 4 MiB in fp32


class Source(Protocol):
    """What tensors are read from: a `Checkpoint`, or one `Shard`."""

    def dtype(self, name: str) -> torch.dtype: ...

    def tensor(self, name: str) -> Tensor: ...

    def drop(self, name: str) -> None: ...


@dataclass(frozen=True)
class LowRank:
    """An adapter's change of a weight `[O, I]`: `W + scale * B A` (arXiv 2106.09685), and with
    `magnitude` its rows brought to that length (DoRA, arXiv 2402.09353).

    `A` is `[r, I]`, `B` `[O, r]`, `magnitude` `[O]` or None. Computed in fp32 or wider.
    """

    A: Tensor
    B: Tensor
    scale: float
    magnitude: Tensor | None = None

    def rows(self, weight: Tensor, start: int) -> Tensor:
        """The changed rows, where `weight` holds the rows from `start` on."""
        wide = torch.promote_types(torch.promote_types(weight.dtype, self.A.dtype), torch.float32)
        b = self.B[start : start + len(weight)].to(wide)
        changed = torch.addmm(weight.to(wide), b, self.A.to(wide), alpha=self.scale)
        if self.magnitude is not None:
            length = changed.norm(dim=1, keepdim=True)
            changed *= self.magnitude[start : start + len(weight), None].to(wide) / length
        return changed


@dataclass(frozen=True)
class Part:
    """A tensor of `source`, or one expert of it.

    Attributes:
        update: a low-rank update that is added, or None.
        replaces: whether an adapter stores it, in place of the base's tensor.
    """

    source: Source
    name: str
    expert: int | None = None
    update: LowRank | None = None
    replaces: bool = False

    @property
    def dtype(self) -> torch.dtype:
        """The dtype of the values that `blocks` yields, before an update."""
        return self.source.dtype(self.name)

    @property
    def dtype_name(self) -> str:
        """Name of the stored dtype."""
        return str(self.dtype).removeprefix("torch.")

    def blocks(self) -> Iterator[Tensor]:
        """The elements in order, as flat tensors of at most `BLOCK` elements or one row. The memory
        of a block is freed when the next one is asked for."""
        tensor = self.source.tensor(self.name)
        tensor = tensor if self.expert is None else tensor[self.expert]
        if not tensor.numel():
            return
        if self.update is None:
            for block in tensor.reshape(-1).split(BLOCK):
                yield block
                self.source.drop(self.name)
            return
        rows = max(1, BLOCK // tensor.shape[1])
        for start in range(0, tensor.shape[0], rows):
            yield self.update.rows(tensor[start : start + rows], start).reshape(-1)
            self.source.drop(self.name)


@dataclass(frozen=True)
class NarrowPart(Part):
    """A weight that `source`, a checkpoint's stored tensors, holds in 8 or 4 bits: its values, in
    fp32."""

    weight: StoredNarrow = field(kw_only=True)

    @property
    def dtype(self) -> torch.dtype:
        return torch.float32

    @property
    def dtype_name(self) -> str:
        return self.weight.layout

    def blocks(self) -> Iterator[Tensor]:
        for rows, values in row_blocks(self.source, self.weight, self.dtype, most=BLOCK):
            changed = self.update.rows(values, rows.start) if self.update else values
            yield changed.reshape(-1)


@dataclass(frozen=True)
class StoredPiece:
    """A tensor to write as `name`: its `parts` one after the other, each cast once to `dtype`."""

    name: str
    shape: Sequence[int]
    dtype: torch.dtype
    parts: Sequence[Part]

    @property
    def merged(self) -> bool:
        """Whether an adapter changes or replaces it."""
        return any(part.update is not None or part.replaces for part in self.parts)

    def blocks(self) -> Iterator[Tensor]:
        """Raises `CheckpointError` where a value is beyond the range of `dtype`."""
        for part in self.parts:
            for block in part.blocks():
                cast = block.to(self.dtype)
                if part.update is not None and not cast.isfinite().all():
                    raise CheckpointError(f"{self.name}: merged, it is not finite in {self.dtype}")
                if cast.dtype != block.dtype and (cast.isinf() & block.isfinite()).any():
                    raise CheckpointError(
                        f"{self.name} holds values beyond the range of {self.dtype}: give bfloat16 "
                        "or float32"
                    )
                yield cast

    def is_written_in(self, source: Source) -> bool:
        """Whether `source` holds exactly this tensor under `name`, compared bit for bit."""
        written = source.tensor(self.name)
        if tuple(written.shape) != tuple(self.shape) or written.dtype != self.dtype:
            return False
        flat, position = written.reshape(-1), 0
        for block in self.blocks():
            if not same_bits(flat[position : position + block.numel()], block):
                return False
            position += block.numel()
            source.drop(self.name)
        return position == flat.numel()


def equal_values(a: Source, first: str, b: Source, second: str) -> bool:
    """Whether two stored tensors of one shape are equal once the first is cast to the dtype of the
    second."""
    pairs = zip(blocks(a.tensor(first)), blocks(b.tensor(second)), strict=True)
    for x, y in pairs:
        if not same_bits(x.to(y.dtype), y):
            return False
        a.drop(first)
        b.drop(second)
    return True
