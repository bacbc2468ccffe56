"""How a checkpoint is spelled when it is written: names, dtypes as read, files, index, config."""

import json
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from fractions import Fraction
from functools import reduce
from typing import Any, Generic, TypeVar

import torch

from nemotron_v3.checkpoint.errors import CheckpointError
from nemotron_v3.checkpoint.names import (
    EXPERTS,
    PREFIXES,
    CheckpointOrigin,
    is_stack,
    majority_dtype,
    to_disk,
)
from nemotron_v3.checkpoint.replace import SINGLE
from nemotron_v3.checkpoint.writer import Writable, nbytes, numel
from nemotron_v3.config import NemotronV3Config

DEFAULT_SHARD_SIZE = "5GB"
_UNITS = {"B": 1, "KB": 10**3, "MB": 10**6, "GB": 10**9, "KIB": 2**10, "MIB": 2**20, "GIB": 2**30}


Written = TypeVar("Written", bound=Writable)


@dataclass(frozen=True)
class Files(Generic[Written]):
    """The files of a checkpoint: what is in each, its notes, and the notes of the index."""

    shards: Mapping[str, Sequence[Written]]
    metadata: Mapping[str, Mapping[str, str]]
    index_metadata: Mapping[str, object] | None  # None: one file, no index


@dataclass(frozen=True)
class Spelling:
    """How tensors are named and stored: as `origin` says, or otherwise where the caller asked."""

    origin: CheckpointOrigin | None
    experts: str
    prefix: str

    @classmethod
    def choose(
        cls, origin: CheckpointOrigin | None, experts: str | None, prefix: str | None
    ) -> "Spelling":
        experts = experts or (origin and origin.experts) or EXPERTS[0]
        prefix = prefix or (origin.prefix if origin else PREFIXES[0])
        if experts not in EXPERTS:
            raise CheckpointError(f"experts={experts!r}: give one of {', '.join(EXPERTS)}")
        if prefix not in PREFIXES:
            raise CheckpointError(f"prefix={prefix!r}: give one of {', '.join(PREFIXES)}")
        return cls(origin, experts, prefix)

    def names(self, name: str, shape: Sequence[int]) -> list[tuple[str, int | None]]:
        """The names on disk of the tensor `name` of the model, each with the expert it holds; None
        where it is not one of a stack's."""
        if is_stack(name) and self.experts == "per_expert":
            return [(to_disk(name, self.prefix, expert), expert) for expert in range(shape[0])]
        return [(to_disk(name, self.prefix), None)]

    def read_dtype(self, name: str, expert: int | None, shape: Sequence[int]) -> torch.dtype | None:
        """The dtype in which the tensor `name`, or one expert of it, was read; the widest where a
        stack's were different, None where it was not read."""
        if self.origin is None:
            return None
        experts: Sequence[int | None] = [expert]
        if is_stack(name) and self.origin.experts == "fused":
            experts = [None]
        elif is_stack(name) and expert is None:
            experts = range(shape[0])
        dtypes = [self.origin.dtypes.get(to_disk(name, self.origin.prefix, e)) for e in experts]
        known = [dtype for dtype in dtypes if dtype is not None]
        return reduce(torch.promote_types, known) if len(known) == len(dtypes) else None

    def writes_tied_head(self) -> bool:
        # transformers draws the head anew where the file has none, whatever the config says.
        return self.origin is None or self.origin.tied_head

    def files(self, pieces: Sequence[Written], max_shard_size: int | str | None) -> Files[Written]:
        """The files to write: shards of at most `max_shard_size`; for None those that were read,
        where the same tensors in the same dtypes are to be written, else shards of 5 GB."""
        limit = parse_size(DEFAULT_SHARD_SIZE if max_shard_size is None else max_shard_size)
        as_read = self._files_as_read(pieces) if max_shard_size is None else None
        return as_read or _new_files(pieces, limit)

    def _files_as_read(self, pieces: Sequence[Written]) -> Files[Written] | None:
        origin = self.origin
        if not origin or not origin.shards or origin.dtypes != {p.name: p.dtype for p in pieces}:
            return None
        by_name = {piece.name: piece for piece in pieces}
        shards = {file: [by_name[n] for n in names] for file, names in origin.shards.items()}
        return Files(shards, origin.metadata, origin.index_metadata)


def parse_size(size: int | str, name: str = "max_shard_size=") -> int:
    """Bytes, from a number or from text as "5GB"; raises `CheckpointError`, which begins with
    `name`."""
    match = re.fullmatch(r"\s*(\d+(?:\.\d+)?)\s*([kmg]?i?b)?\s*", str(size), re.IGNORECASE)
    limit = int(Fraction(match[1]) * _UNITS[(match[2] or "B").upper()]) if match else 0
    if limit < 1:
        raise CheckpointError(f"{name}{size!r}: give bytes, or text as '5GB' or '500MiB'")
    return limit


def _new_files(pieces: Sequence[Written], limit: int) -> Files[Written]:
    shards: list[list[Written]] = [[]]
    room = limit
    for piece in pieces:
        if nbytes(piece) > room and shards[-1]:
            shards.append([])
            room = limit
        shards[-1].append(piece)
        room -= nbytes(piece)
    count = len(shards)
    names = [f"model-{i:05}-of-{count:05}.safetensors" for i in range(1, count + 1)]
    names = names if count > 1 else [SINGLE]
    # Wide dtypes first, as the safetensors library orders them: every tensor lies aligned.
    ordered = [sorted(shard, key=lambda p: (-p.dtype.itemsize, p.name)) for shard in shards]
    totals = {
        "total_parameters": sum(map(numel, pieces)),
        "total_size": sum(map(nbytes, pieces)),
    }
    return Files(
        shards=dict(zip(names, ordered, strict=True)),
        metadata={name: {"format": "pt"} for name in names},
        index_metadata=totals if count > 1 else None,
    )


def index_text(files: Files[Any]) -> str:
    """The content of model.safetensors.index.json."""
    places = {piece.name: file for file, shard in files.shards.items() for piece in shard}
    content = {"metadata": files.index_metadata, "weight_map": places}
    return json.dumps(content, indent=2, sort_keys=True) + "\n"


def config_to_write(
    config: NemotronV3Config, pieces: Sequence[Writable], origin: CheckpointOrigin | None
) -> NemotronV3Config:
    """`config` with the dtype of most weights, or the one it has while they are in the dtype that
    they were read in."""
    written = majority_dtype((piece.dtype, numel(piece)) for piece in pieces)
    if origin is not None and written == origin.dtype:
        return config
    return config.replace(dtype=written)
