"""From a model in memory to a checkpoint on disk, in the spelling it was read with."""

import json
import os
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import reduce
from pathlib import Path

import torch
from torch import Tensor, nn

from nemotron_v3.checkpoint.errors import CheckpointError
from nemotron_v3.checkpoint.header import DTYPE_NAMES, WEIGHT_DTYPE_NAMES, WEIGHT_DTYPES
from nemotron_v3.checkpoint.names import (
    EMBEDDINGS,
    EXPERTS,
    LM_HEAD,
    PREFIXES,
    CheckpointOrigin,
    is_carried,
    is_stack,
    majority_dtype,
    to_disk,
)
from nemotron_v3.checkpoint.plan import tensors_of
from nemotron_v3.checkpoint.replace import CONFIG, INDEX, SINGLE, replacing
from nemotron_v3.checkpoint.writer import Piece, survives, write_safetensors
from nemotron_v3.config import NemotronV3Config
from nemotron_v3.model.dtypes import memory_dtype
from nemotron_v3.model.model import NemotronV3ForCausalLM

DEFAULT_SHARD_SIZE = "5GB"
_UNITS = {"B": 1, "KB": 10**3, "MB": 10**6, "GB": 10**9, "KIB": 2**10, "MIB": 2**20, "GIB": 2**30}


@torch.no_grad()
def save_pretrained(
    model: NemotronV3ForCausalLM,
    path: str | os.PathLike,
    dtype: torch.dtype | None = None,
    max_shard_size: int | str | None = None,
    experts: str | None = None,
    prefix: str | None = None,
) -> None:
    """Write `model` to the directory `path`: config.json, and model.safetensors or shards with an
    index.

    What was there is replaced once the new checkpoint is whole; a save that is killed or fails
    leaves it, and other files in the directory are never touched. A model that was loaded is
    written in the spelling it was read with, its `mtp` tensors included: loaded and saved
    unchanged, the files are the same to the byte. Beside the model it takes the memory of one block
    of 16 million elements.

    Args:
        model: on any device.
        path: made if it does not exist; may be the directory the model was loaded from.
        dtype: of all weights but `A_log`, `D`, `dt_bias` and `e_score_correction_bias`, which are
            written in fp32 or wider, and `mtp.*`, which stay as they are. None: each tensor in the
            dtype it was read in if every value survives that, else the one it has in memory.
        max_shard_size: bytes, or text as "5GB", "500MB", "1GiB"; a larger tensor gets a shard of
            its own. None: the files that were read, where tensors and dtypes still are the same,
            else 5GB.
        experts: "per_expert", one tensor for each, or "fused", one stack; None is as read, else
            "per_expert".
        prefix: "backbone." or "model."; None is as read, else "backbone.".

    Raises:
        TypeError: not a `NemotronV3ForCausalLM`, as a wrapper around one.
        CheckpointError (a ValueError): an option that is not offered; a model whose tensors are not
            those of its config, as with unmerged adapters, or have no values; another process that
            saves to `path`. Nothing is changed then.
        OSError: the disk refuses, a full one included; the old checkpoint stays.
    """
    if not isinstance(model, NemotronV3ForCausalLM):
        raise TypeError(
            f"a {type(model).__name__} cannot be saved: give the NemotronV3ForCausalLM inside it"
        )
    spelling = _Spelling.choose(model.checkpoint_origin, experts, prefix)
    if dtype is not None and dtype not in WEIGHT_DTYPES.values():
        raise CheckpointError(f"no model is saved in dtype {dtype}: give {WEIGHT_DTYPE_NAMES}")
    limit = _bytes(DEFAULT_SHARD_SIZE if max_shard_size is None else max_shard_size)
    tensors = tensors_of(model)
    _check_complete(model, tensors)
    pieces = [p for name, t in tensors.items() for p in spelling.pieces(name, t, dtype)]
    if model.config.tie_word_embeddings and spelling.writes_tied_head():
        pieces.append(spelling.piece(LM_HEAD, LM_HEAD, tensors[EMBEDDINGS], dtype))
    pieces += [Piece(name, tensor, tensor.dtype) for name, tensor in (model.mtp or {}).items()]
    files = spelling.files_as_read(pieces) if max_shard_size is None else None
    files = files or _new_files(pieces, limit)
    with replacing(Path(path)) as directory:
        for file in files.shards:
            write_safetensors(directory / file, files.shards[file], files.metadata[file])
        if files.index_metadata is not None:
            (directory / INDEX).write_text(_index(files))
        _config(model.config, pieces, model.checkpoint_origin).to_json(directory / CONFIG)


@dataclass(frozen=True)
class _Files:
    shards: Mapping[str, Sequence[Piece]]
    metadata: Mapping[str, Mapping[str, str]]
    index_metadata: Mapping[str, object] | None  # None: one file, no index


@dataclass(frozen=True)
class _Spelling:
    """How tensors are named and stored: as `origin` says, or otherwise where the caller asked."""

    origin: CheckpointOrigin | None
    experts: str
    prefix: str

    @classmethod
    def choose(
        cls, origin: CheckpointOrigin | None, experts: str | None, prefix: str | None
    ) -> "_Spelling":
        experts = experts or (origin and origin.experts) or EXPERTS[0]
        prefix = prefix or (origin.prefix if origin else PREFIXES[0])
        if experts not in EXPERTS:
            raise CheckpointError(f"experts={experts!r}: give one of {', '.join(EXPERTS)}")
        if prefix not in PREFIXES:
            raise CheckpointError(f"prefix={prefix!r}: give one of {', '.join(PREFIXES)}")
        return cls(origin, experts, prefix)

    def pieces(self, name: str, tensor: Tensor, dtype: torch.dtype | None) -> list[Piece]:
        """What is written for the tensor `name` of the model."""
        if is_stack(name) and self.experts == "per_expert":
            parts = [(expert, tensor[expert]) for expert in range(tensor.shape[0])]
        else:
            parts = [(None, tensor)]
        return [self.piece(to_disk(name, self.prefix, e), name, t, dtype, e) for e, t in parts]

    def piece(
        self,
        disk: str,
        name: str,
        tensor: Tensor,
        dtype: torch.dtype | None,
        expert: int | None = None,
    ) -> Piece:
        if dtype is not None:
            return Piece(disk, tensor, memory_dtype(name, dtype))
        read = self._read_dtype(name, expert, tensor)
        keeps = read is None or read == tensor.dtype or not survives(tensor, read)
        return Piece(disk, tensor, tensor.dtype if keeps else read)

    def _read_dtype(self, name: str, expert: int | None, tensor: Tensor) -> torch.dtype | None:
        if self.origin is None:
            return None
        experts: Sequence[int | None] = [expert]
        if is_stack(name) and self.origin.experts == "fused":
            experts = [None]
        elif is_stack(name) and expert is None:
            experts = range(tensor.shape[0])
        dtypes = [self.origin.dtypes.get(to_disk(name, self.origin.prefix, e)) for e in experts]
        return None if None in dtypes else reduce(torch.promote_types, dtypes)

    def writes_tied_head(self) -> bool:
        # transformers draws the head anew where the file has none, whatever the config says.
        return self.origin is None or self.origin.tied_head

    def files_as_read(self, pieces: Sequence[Piece]) -> _Files | None:
        """The files that were read, where the same tensors in the same dtypes are to be written."""
        origin = self.origin
        if not origin or not origin.shards or origin.dtypes != {p.name: p.dtype for p in pieces}:
            return None
        by_name = {piece.name: piece for piece in pieces}
        shards = {file: [by_name[n] for n in names] for file, names in origin.shards.items()}
        return _Files(shards, origin.metadata, origin.index_metadata)


def _check_complete(model: NemotronV3ForCausalLM, tensors: Mapping[str, Tensor]) -> None:
    with torch.device("meta"):
        expected = tensors_of(NemotronV3ForCausalLM(model.config, model.model.backend))
    problems = [f"{name} is not in the model" for name in expected.keys() - tensors.keys()]
    for name, tensor in tensors.items():
        if name not in expected:
            problems.append(f"{name} is no tensor of the config: merge or remove adapters first")
        elif tensor.shape != expected[name].shape:
            told = f"{tuple(tensor.shape)}, the config asks for {tuple(expected[name].shape)}"
            problems.append(f"{name} is {told}")
        elif tensor.is_meta:
            problems.append(f"{name} is on the meta device and has no values")
        elif type(tensor) not in (Tensor, nn.Parameter):
            problems.append(f"{name} is a {type(tensor).__name__}: gather it into a plain tensor")
        elif tensor.dtype not in WEIGHT_DTYPES.values():
            problems.append(f"{name} is {tensor.dtype}: cast it to one of {WEIGHT_DTYPE_NAMES}")
    for name, tensor in (model.mtp or {}).items():
        if not is_carried(name) or tensor.is_meta or tensor.dtype not in DTYPE_NAMES:
            told = f"{tensor.dtype} on {tensor.device}"
            problems.append(f"{name} in model.mtp ({told}) is no stored tensor named mtp.*")
    if problems:
        raise CheckpointError("the model cannot be saved", sorted(problems))


def _bytes(size: int | str) -> int:
    match = re.fullmatch(r"\s*(\d+(?:\.\d+)?)\s*([kmg]?i?b)?\s*", str(size), re.IGNORECASE)
    unit = (match[2] or "B").upper() if match else None
    if unit not in _UNITS or (limit := int(float(match[1]) * _UNITS[unit])) < 1:
        raise CheckpointError(f"max_shard_size={size!r}: give bytes, or text as '5GB' or '500MiB'")
    return limit


def _new_files(pieces: Sequence[Piece], limit: int) -> _Files:
    shards: list[list[Piece]] = [[]]
    room = limit
    for piece in pieces:
        if piece.nbytes > room and shards[-1]:
            shards.append([])
            room = limit
        shards[-1].append(piece)
        room -= piece.nbytes
    count = len(shards)
    names = [f"model-{i:05}-of-{count:05}.safetensors" for i in range(1, count + 1)]
    names = names if count > 1 else [SINGLE]
    # Wide dtypes first, as the safetensors library orders them: every tensor lies aligned.
    ordered = [sorted(shard, key=lambda p: (-p.dtype.itemsize, p.name)) for shard in shards]
    totals = {
        "total_parameters": sum(piece.tensor.numel() for piece in pieces),
        "total_size": sum(piece.nbytes for piece in pieces),
    }
    return _Files(
        shards=dict(zip(names, ordered, strict=True)),
        metadata={name: {"format": "pt"} for name in names},
        index_metadata=totals if count > 1 else None,
    )


def _index(files: _Files) -> str:
    places = {piece.name: file for file, shard in files.shards.items() for piece in shard}
    content = {"metadata": files.index_metadata, "weight_map": places}
    return json.dumps(content, indent=2, sort_keys=True) + "\n"


def _config(
    config: NemotronV3Config, pieces: Sequence[Piece], origin: CheckpointOrigin | None
) -> NemotronV3Config:
    """The config to write: its dtype is that of most weights, or what it was while they are in the
    dtype that they were read in."""
    written = majority_dtype((piece.dtype, piece.tensor.numel()) for piece in pieces)
    if origin is not None and written == origin.dtype:
        return config
    return config.replace(dtype=written)
