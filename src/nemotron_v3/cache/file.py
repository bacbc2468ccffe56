"""A cache on disk: one safetensors file with the positions in its header."""

import json
import os
import secrets
from collections.abc import Mapping
from os import PathLike
from pathlib import Path
from typing import Any

from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file

from nemotron_v3.cache.states import LayerState

FORMAT = "nemotron_v3.cache.1"


def write_states(
    path: str | PathLike[str], states: Mapping[int, LayerState], header: Mapping[str, Any]
) -> None:
    """Write to a temporary name first, so that `path` is either whole or as it was."""
    path = Path(path)
    tensors = {
        f"{layer}.{name}": tensor.detach().contiguous()
        for layer, state in states.items()
        for name, tensor in state.tensors().items()
    }
    temporary = path.with_name(f".{path.name}.{secrets.token_hex(4)}.tmp")
    try:
        save_file(tensors, temporary, {"format": FORMAT, "header": json.dumps(header)})
        os.replace(temporary, path)
    finally:
        temporary.unlink(missing_ok=True)


def read_states(
    path: str | PathLike[str],
    like: Mapping[int, LayerState],
    expected: Mapping[str, Any],
    batch_size: int,
) -> tuple[dict[str, Any], dict[int, LayerState]]:
    """The header and the states of a file, after checking that they fit.

    Args:
        like: states of the kinds, and on the devices, that are wanted.
        expected: entries the header must have.
        batch_size: rows it must have.

    Raises:
        ValueError: a file that is no whole cache, or one that does not fit.
    """
    try:
        with safe_open(path, "pt") as file:
            metadata = file.metadata() or {}
            if metadata.get("format") != FORMAT:
                raise ValueError(
                    f"{path} is no cache (format {metadata.get('format')!r}): give a file that "
                    "NemotronHybridCache.save wrote"
                )
            header = json.loads(metadata["header"])
            _check(path, header, expected, batch_size)
            states = {
                layer: type(state)(
                    **{name: file.get_tensor(f"{layer}.{name}") for name in state.tensors()}
                )
                for layer, state in like.items()
            }
    except SafetensorError as error:
        raise ValueError(f"{path} is no whole safetensors file: {error}") from None
    return header, states


def _check(path: Any, header: dict[str, Any], expected: Mapping[str, Any], rows: int) -> None:
    if len(header["lengths"]) != rows:
        raise ValueError(f"{path} holds {len(header['lengths'])} rows, the cache has {rows}")
    for name, value in expected.items():
        if header[name] != value:
            raise ValueError(f"{path} holds a cache with {name} {header[name]}, not {value}")
