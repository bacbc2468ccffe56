"""Writing one safetensors file, a block of bytes at a time."""

import ctypes
import json
import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import BinaryIO, Protocol

import torch
from torch import Tensor

from nemotron_v3.checkpoint.header import DTYPE_NAMES

BLOCK = 2**24  # elements handled at once when tensors are cast, compared and written


class Writable(Protocol):
    """A tensor to write as `name`, of `shape` and in `dtype`, that need not be in memory as one."""

    @property
    def name(self) -> str: ...

    @property
    def shape(self) -> Sequence[int]: ...

    @property
    def dtype(self) -> torch.dtype: ...

    def blocks(self) -> Iterator[Tensor]:
        """Its elements in order as flat tensors, on any device and in any dtype; a block is done
        with before the next one is asked for."""
        ...


@dataclass(frozen=True)
class Piece:
    """A tensor to write: `tensor`, on any device and in any dtype, becomes `name` in `dtype`."""

    name: str
    tensor: Tensor
    dtype: torch.dtype

    @property
    def shape(self) -> Sequence[int]:
        return self.tensor.shape

    def blocks(self) -> Iterator[Tensor]:
        return blocks(self.tensor)


def numel(piece: Writable) -> int:
    return math.prod(piece.shape)


def nbytes(piece: Writable) -> int:
    """Bytes that `piece` takes in a file."""
    return numel(piece) * piece.dtype.itemsize


def blocks(tensor: Tensor) -> Iterator[Tensor]:
    """The elements of `tensor` in order, at most BLOCK of them at once, as flat tensors."""
    return iter(tensor.detach().reshape(-1).split(BLOCK)) if tensor.numel() else iter(())


def same_bits(a: Tensor, b: Tensor) -> bool:
    """Whether two tensors of one shape and dtype hold the same bits: NaNs and signed zeros too."""
    bits = {1: torch.uint8, 2: torch.int16, 4: torch.int32, 8: torch.int64}[a.dtype.itemsize]
    return a.dtype == b.dtype and torch.equal(a.view(bits), b.view(bits))


def same_values(a: Tensor, b: Tensor) -> bool:
    """Whether two tensors of one shape and dtype hold the same bits, taking one NaN for another: a
    cast does not promise which of them it gives."""
    if same_bits(a, b):
        return True
    nans = a.isnan(), b.isnan()
    return torch.equal(*nans) and same_bits(a.masked_fill(nans[0], 0), b.masked_fill(nans[1], 0))


def survives(tensor: Tensor, dtype: torch.dtype) -> bool:
    """Whether every value of `tensor` comes back from `dtype` as it was."""
    return all(same_values(block.to(dtype).to(block.dtype), block) for block in blocks(tensor))


def write_safetensors(path: Path, pieces: Sequence[Writable], metadata: Mapping[str, str]) -> None:
    """Write `pieces` to a file in the order given, with `metadata` as the file's notes.

    Beside what `pieces` hold already it takes the memory of one block; the caller waits for the
    disk. Raises `OSError` when that refuses, a full one included.
    """
    listing: dict[str, object] = {"__metadata__": dict(metadata)} if metadata else {}
    position = 0
    for piece in pieces:
        listing[piece.name] = {
            "dtype": DTYPE_NAMES[piece.dtype],
            "shape": list(piece.shape),
            "data_offsets": [position, position + nbytes(piece)],
        }
        position += nbytes(piece)
    header = json.dumps(listing, separators=(",", ":"), ensure_ascii=False).encode()
    header += b" " * (-len(header) % 8)  # so that the tensors start aligned
    with path.open("wb") as file:
        file.write(len(header).to_bytes(8, "little"))
        file.write(header)
        for piece in pieces:
            for block in piece.blocks():
                _write(file, block.to("cpu", piece.dtype))


def _write(file: BinaryIO, block: Tensor) -> None:
    """Write the bytes of a flat CPU tensor without copying them, and without numpy."""
    block = block.contiguous()
    size = block.numel() * block.itemsize
    file.write(memoryview((ctypes.c_char * size).from_address(block.data_ptr())))
