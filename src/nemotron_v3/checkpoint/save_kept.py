"""Saving a model whose weights stayed in 8 or 4 bits: the tensors that were read, as they were."""

from collections.abc import Iterator, Mapping
from dataclasses import replace
from typing import Any

from torch import Tensor

from nemotron_v3.checkpoint.convert_kept import as_stored
from nemotron_v3.checkpoint.errors import CheckpointError
from nemotron_v3.checkpoint.names import CheckpointOrigin
from nemotron_v3.checkpoint.narrow.layouts import StoredNarrow
from nemotron_v3.checkpoint.reader import Checkpoint
from nemotron_v3.checkpoint.spelling import Spelling
from nemotron_v3.checkpoint.writer import Piece
from nemotron_v3.layers.narrow import NarrowWeight


def as_held(checkpoint: Checkpoint, origin: CheckpointOrigin) -> CheckpointOrigin:
    """`origin` of a model that keeps the narrow weights of `checkpoint`."""
    if origin.layers is not None or checkpoint.stored.outer:
        return origin  # such a model cannot be saved as it is held
    stored = checkpoint.stored
    companions = {name: stored.tensor(name) for name in checkpoint.narrow.companions}
    return replace(as_stored(checkpoint, origin), narrow=checkpoint.narrow, companions=companions)


def check_held(
    tensors: Mapping[str, Tensor], origin: CheckpointOrigin | None, asked: Mapping[str, Any]
) -> None:
    """Raise `CheckpointError` where a model with narrow weights cannot be saved as it is, or is to
    become something else."""
    held = [name for name, tensor in tensors.items() if isinstance(tensor, NarrowWeight)]
    if not held:
        return
    way_out = "load the checkpoint wide (narrow=False), or use convert(..., dequantise=True)"
    if wanted := [f"{name}={value}" for name, value in asked.items() if value is not None]:
        raise CheckpointError(
            f"{len(held):,} weights are in 8 or 4 bits and stay as they are: leave out "
            f"{', '.join(wanted)}, or {way_out}"
        )
    count = sum(t.shape[0] if t.dim() == 3 else 1 for t in map(tensors.__getitem__, held))
    narrow = None if origin is None else origin.narrow
    if narrow is None or count != len(narrow.weights):
        raise CheckpointError(
            f"{held[0]} is in 8 or 4 bits, and not all weights are those of the checkpoint that "
            f"it was read from: {way_out}"
        )


def held_pieces(spelling: Spelling, name: str, tensor: NarrowWeight) -> Iterator[Piece]:
    """The stored tensors of a narrow weight of the model, or of each expert of one."""
    origin = spelling.origin
    assert origin is not None and origin.narrow is not None
    for disk, expert in spelling.names(name, tensor.shape):
        weight = origin.narrow.weights[disk]
        one = tensor.parts if expert is None else tensor.parts.map(lambda part, e=expert: part[e])
        for stored, part in zip(
            (weight.codes, weight.scale, weight.global_scale), one, strict=True
        ):
            if stored is not None and part is not None:
                yield _piece(origin, stored, part, weight)


def _piece(origin: CheckpointOrigin, stored: str, part: Tensor, weight: StoredNarrow) -> Piece:
    shape = part.shape if stored == weight.codes else origin.companions[stored].shape
    return Piece(stored, part.reshape(shape), origin.dtypes[stored])


def ignored_pieces(origin: CheckpointOrigin | None) -> list[Piece]:
    """The scales of activations and of a cache that stood beside narrow weights."""
    if origin is None or origin.narrow is None:
        return []
    found = ((name, origin.companions[name]) for name in origin.narrow.ignored)
    return [Piece(name, tensor, tensor.dtype) for name, tensor in found]
