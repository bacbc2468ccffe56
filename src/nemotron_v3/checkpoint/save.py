"""Save a model in memory to a checkpoint on disk, in the spelling it was read with."""

import os
from collections.abc import Mapping
from pathlib import Path

import torch
from torch import Tensor, nn

from nemotron_v3.checkpoint.errors import CheckpointError
from nemotron_v3.checkpoint.header import (
    DTYPE_NAMES,
    WEIGHT_DTYPE_NAMES,
    WEIGHT_DTYPES,
    weight_dtype,
)
from nemotron_v3.checkpoint.names import EMBEDDINGS, LM_HEAD, is_carried
from nemotron_v3.checkpoint.plan import tensors_of
from nemotron_v3.checkpoint.replace import CONFIG, INDEX, replacing
from nemotron_v3.checkpoint.save_kept import check_held, held_pieces, ignored_pieces
from nemotron_v3.checkpoint.side_files import side_files_to_write, write_side_files
from nemotron_v3.checkpoint.spelling import (
    Spelling,
    config_to_write,
    index_text,
)
from nemotron_v3.checkpoint.writer import Piece, survives, write_safetensors
from nemotron_v3.layers.narrow import NarrowWeight
from nemotron_v3.model.dtypes import memory_dtype
from nemotron_v3.model.model import NemotronV3ForCausalLM


@torch.no_grad()
def save_pretrained(
    model: NemotronV3ForCausalLM,
    path: str | os.PathLike[str],
    dtype: torch.dtype | str | None = None,
    max_shard_size: int | str | None = None,
    experts: str | None = None,
    prefix: str | None = None,
) -> None:
    """Write `model` to the directory `path`: config.json, and model.safetensors or shards with an
    index.

    What was there is replaced once the new checkpoint is whole; a save that is killed or fails
    leaves it, and other files in the directory are never touched. A model that was loaded is
    written in the spelling it was read with, its `mtp` tensors included: loaded and saved
    unchanged, the files are the same to the byte. Tokenizer, chat template and generation config
    that it was loaded with are copied too. Files of these names that are in the directory already
    are kept, with a warning; a `model.generation_config` that was changed is written. Beside the
    model it takes the memory of one block of 16 million elements.

    Args:
        model: on any device.
        path: made if it does not exist; may be the directory the model was loaded from.
        dtype: of all weights but `A_log`, `D`, `dt_bias` and `e_score_correction_bias`, which are
            written in fp32 or wider, and `mtp.*`, which stay as they are; torch's dtype or its
            name. None or "auto": each tensor in the dtype it was read in if every value survives
            that, else the one it has in memory.
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
    spelling = Spelling.choose(model.checkpoint_origin, experts, prefix)
    dtype = weight_dtype(dtype, "saved")
    tensors = tensors_of(model)
    _check_complete(model, tensors)
    asked = {"dtype": dtype, "experts": experts, "prefix": prefix}
    check_held(tensors, model.checkpoint_origin, asked)
    pieces = [p for name, t in tensors.items() for p in _pieces(spelling, name, t, dtype)]
    if model.config.tie_word_embeddings and spelling.writes_tied_head():
        pieces.append(_piece(spelling, LM_HEAD, LM_HEAD, tensors[EMBEDDINGS], dtype))
    pieces += [Piece(name, tensor, tensor.dtype) for name, tensor in (model.mtp or {}).items()]
    pieces += ignored_pieces(model.checkpoint_origin)
    files = spelling.files(pieces, max_shard_size)
    origin = model.checkpoint_origin
    came_with = {} if origin is None else origin.side_files
    side_files = side_files_to_write(came_with, model.generation_config, Path(path))
    with replacing(Path(path)) as directory:
        for file in files.shards:
            write_safetensors(directory / file, files.shards[file], files.metadata[file])
        if files.index_metadata is not None:
            (directory / INDEX).write_text(index_text(files))
        write_side_files(directory, side_files)
        config = config_to_write(model.config, pieces, model.checkpoint_origin)
        config.to_json(directory / CONFIG)


def _pieces(
    spelling: Spelling, name: str, tensor: Tensor, dtype: torch.dtype | None
) -> list[Piece]:
    """What is written for the tensor `name` of the model."""
    if isinstance(tensor, NarrowWeight):
        return list(held_pieces(spelling, name, tensor))
    names = spelling.names(name, tensor.shape)
    return [
        _piece(spelling, disk, name, tensor if expert is None else tensor[expert], dtype, expert)
        for disk, expert in names
    ]


def _piece(
    spelling: Spelling,
    disk: str,
    name: str,
    tensor: Tensor,
    dtype: torch.dtype | None,
    expert: int | None = None,
) -> Piece:
    if dtype is not None:
        return Piece(disk, tensor, memory_dtype(name, dtype))
    read = spelling.read_dtype(name, expert, tensor.shape)
    if read is None or not (read == tensor.dtype or survives(tensor, read)):
        read = tensor.dtype
    return Piece(disk, tensor, read)


def _check_complete(model: NemotronV3ForCausalLM, tensors: Mapping[str, Tensor]) -> None:
    with torch.device("meta"):
        expected = tensors_of(NemotronV3ForCausalLM(model.config, model.model.backend))
    problems = [f"{name} is not in the model" for name in expected.keys() - tensors.keys()]
    for name, tensor in tensors.items():
        if name not in expected:
            problems.append(f"{name} is no tensor of the config: merge or remove adapters first")
        elif tensor.shape != expected[name].shape:
            found = f"{tuple(tensor.shape)}, the config asks for {tuple(expected[name].shape)}"
            problems.append(f"{name} is {found}")
        elif tensor.is_meta:
            problems.append(f"{name} is on the meta device and has no values")
        elif type(tensor) not in (Tensor, nn.Parameter, NarrowWeight):
            problems.append(f"{name} is a {type(tensor).__name__}: gather it into a plain tensor")
        elif tensor.dtype not in WEIGHT_DTYPES.values():
            problems.append(f"{name} is {tensor.dtype}: cast it to one of {WEIGHT_DTYPE_NAMES}")
    for name, tensor in (model.mtp or {}).items():
        if not is_carried(name) or tensor.is_meta or tensor.dtype not in DTYPE_NAMES:
            found = f"{tensor.dtype} on {tensor.device}"
            problems.append(f"{name} in model.mtp ({found}) is no stored tensor named mtp.*")
    if problems:
        raise CheckpointError("the model cannot be saved", sorted(problems))
