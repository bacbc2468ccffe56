"""A conversion that leaves weights in 8 or 4 bits as they are: other files, the same bytes."""

from collections.abc import Mapping
from dataclasses import replace
from typing import Any

from nemotron_v3.checkpoint.convert_pieces import Part, StoredPiece
from nemotron_v3.checkpoint.errors import CheckpointError
from nemotron_v3.checkpoint.names import CheckpointOrigin, majority_dtype
from nemotron_v3.checkpoint.reader import Checkpoint


def check_kept(checkpoint: Checkpoint, asked: Mapping[str, Any]) -> None:
    """Raise `CheckpointError` where something is asked for that such weights cannot become.

    Names and layers stay too: quantization_config calls the modules by them.
    """
    if checkpoint.stored.outer:
        raise CheckpointError(
            f"{checkpoint.path} holds a text model among others, with weights in 8 or 4 bits: give "
            "dequantise=True (--dequantise) for the text model alone"
        )
    if wanted := [f"{name}={value}" for name, value in asked.items() if value is not None]:
        count = len(checkpoint.narrow.weights)
        raise CheckpointError(
            f"{checkpoint.path} has {count:,} weights in 8 or 4 bits, which stay as they are: "
            f"{', '.join(wanted)} needs dequantise=True (--dequantise), or leave it out"
        )


def as_stored(checkpoint: Checkpoint, origin: CheckpointOrigin) -> CheckpointOrigin:
    """`origin` with the tensors that the files hold, in place of the weights made of them."""
    stored = checkpoint.stored
    return replace(
        origin,
        dtype=majority_dtype((stored.dtype(name), stored.entry(name).numel) for name in stored),
        dtypes={name: stored.dtype(name) for name in stored},
        shards={file: tuple(shard.entries) for file, shard in checkpoint.shards.items()},
        metadata={file: dict(shard.metadata) for file, shard in checkpoint.shards.items()},
    )


def stored_pieces(checkpoint: Checkpoint) -> list[StoredPiece]:
    """Every tensor of the files as it lies there."""
    stored = checkpoint.stored
    return [
        StoredPiece(name, stored.shape(name), stored.dtype(name), [Part(stored, name)])
        for name in stored
    ]
