"""A cache on disk: one safetensors file with the positions in its header.

A file may come from anywhere: all that it claims is checked before a cache is changed.
"""

import json
import os
from collections.abc import Mapping
from os import PathLike
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from nemotron_v3.cache.checks import check_positions, check_room
from nemotron_v3.cache.states import CacheSnapshot, KeyValueState, LayerState
from nemotron_v3.config.atomic import atomic_file
from nemotron_v3.config.files import MAX_JSON_BYTES, open_regular, parse_object

FORMAT = "nemotron_v3.cache.1"
_NEEDED = ("lengths", "floors")
_OPTIONAL = ("behind",)  # files of older versions do not have it


def write_snapshot(
    path: str | PathLike[str], snapshot: CacheSnapshot, kind: Mapping[str, Any]
) -> None:
    """Write to a temporary name first, so that `path` is either whole or as it was.

    Raises:
        ValueError: `path` is something else than a regular file, which would be replaced.
    """
    header = {
        **kind,
        "lengths": snapshot.lengths,
        "floors": snapshot.floors,
        "behind": sorted(snapshot.behind),
    }
    tensors = {
        f"{layer}.{name}": tensor.detach().contiguous()
        for layer, state in snapshot.states.items()
        for name, tensor in state.tensors().items()
    }
    with atomic_file(path) as temporary:
        save_file(tensors, temporary, {"format": FORMAT, "header": json.dumps(header)})


def read_snapshot(
    path: str | PathLike[str],
    like: Mapping[int, LayerState],
    kind: Mapping[str, Any],
    rows: int,
    max_length: int | None,
    window: int,
) -> CacheSnapshot:
    """What a file holds, after checking that it fits and does not contradict itself.

    Args:
        like: states of the kinds that are wanted.
        kind: entries that the header must have.
        rows: it must have.
        max_length: tokens a row may hold, or None.
        window: the cache's rollback window.

    Raises:
        ValueError: a file that is no whole cache, or one that does not fit.
    """
    _check_names(path)
    try:
        with safe_open(path, "pt") as file:
            header = _header(path, file.metadata() or {}, kind)
            lengths, floors = tuple(header["lengths"]), tuple(header["floors"])
            behind = header.get("behind", [])
            check_positions(path, lengths, floors, behind, rows, window, like)
            check_room(path, max(lengths), max_length)
            _check_set(path, like, set(file.keys()))
            shapes = _shapes(like, lengths, behind, file)
            states = {
                layer: type(state)(
                    **{
                        name: _tensor(path, file, f"{layer}.{name}", shapes, tensor.dtype)
                        for name, tensor in state.tensors().items()
                    }
                )
                for layer, state in like.items()
            }
    except SafetensorError as error:
        raise ValueError(f"{path} is no whole safetensors file: {error}") from None
    for layer, state in states.items():
        if isinstance(state, KeyValueState):
            _check_nothing_behind(path, layer, state, lengths)
    return CacheSnapshot(lengths, floors, states, frozenset(behind))


def _check_names(path: str | PathLike[str]) -> None:
    """Raises ValueError for no regular file, or one that names a tensor twice, of which the library
    would take one."""
    with open_regular(path) as file:
        size, start = os.fstat(file.fileno()).st_size, file.read(8)
        length = int.from_bytes(start, "little")
        if len(start) < 8 or length > min(size - 8, MAX_JSON_BYTES):
            raise ValueError(f"{path} is no whole safetensors file: it has {size} bytes")
        parse_object(file.read(length), f"{path} is no whole safetensors file: its header")


def _header(path: Any, notes: Mapping[str, str], kind: Mapping[str, Any]) -> dict[str, Any]:
    if notes.get("format") != FORMAT or "header" not in notes:
        raise ValueError(
            f"{path} is no cache (format {notes.get('format')!r}): give a file that "
            "NemotronHybridCache.save wrote"
        )
    header = parse_object(notes["header"], f"{path}: its positions")
    known = {*kind, *_NEEDED, *_OPTIONAL}
    if missing := known - header.keys() - {*_OPTIONAL}:
        raise ValueError(f"{path} is no cache: it does not tell {', '.join(sorted(missing))}")
    if extra := header.keys() - known:
        raise ValueError(f"{path} tells what no cache has: {', '.join(map(repr, sorted(extra)))}")
    for name, value in kind.items():
        # As text: to Python 1, 1.0 and True are equal.
        if json.dumps(header[name], sort_keys=True) != json.dumps(value, sort_keys=True):
            raise ValueError(f"{path} holds a cache with {name} {header[name]}, not {value}")
    for name in (*_NEEDED, *_OPTIONAL):
        if not isinstance(header.get(name, []), list):
            raise ValueError(f"{path} is no cache: its {name} are {header[name]!r}, no list")
    return header


def _shapes(
    like: Mapping[int, LayerState], lengths: tuple[int, ...], behind: list[int], file: Any
) -> dict[str, tuple[int, ...]]:
    """The shapes that the lengths ask for, by the tensor's name."""
    longest, shapes = max(lengths), {}
    for layer, state in like.items():
        places = longest
        if isinstance(state, KeyValueState) and layer in behind:
            # A layer that was left out holds fewer tokens, and as many keys as values.
            held = file.get_slice(f"{layer}.keys").get_shape()
            places = min(longest, held[2] if len(held) == 4 else longest)
        for name, tensor in state.tensors().items():
            shape = list(tensor.shape)
            if isinstance(state, KeyValueState):
                shape[2] = places
            shapes[f"{layer}.{name}"] = tuple(shape)
    return shapes


def _check_set(path: Any, like: Mapping[int, LayerState], held: set[str]) -> None:
    wanted = {f"{layer}.{name}" for layer, state in like.items() for name in state.tensors()}
    if wanted != held:
        missing, extra = sorted(wanted - held), sorted(held - wanted)
        raise ValueError(
            f"{path} does not hold the tensors of this cache: it lacks {missing or 'none'} and has "
            f"{extra or 'none'} beside them"
        )


def _tensor(
    path: Any, file: Any, name: str, shapes: Mapping[str, tuple[int, ...]], dtype: torch.dtype
) -> Tensor:
    shape = tuple(file.get_slice(name).get_shape())
    if shape != shapes[name]:
        raise ValueError(
            f"{path}: {name} has shape {shape}, and its lengths ask for {shapes[name]}"
        )
    tensor = file.get_tensor(name)
    if tensor.dtype != dtype:
        raise ValueError(f"{path}: {name} is {tensor.dtype}, the cache holds {dtype}")
    return tensor


def _check_nothing_behind(
    path: Any, layer: int, state: KeyValueState, lengths: tuple[int, ...]
) -> None:
    """Raises ValueError for keys or values behind a row's own length: attention gives them weight
    0, and 0 times a NaN is a NaN."""
    for name, tensor in state.tensors().items():
        for row, length in enumerate(lengths):
            if torch.count_nonzero(tensor[row, :, length:]):
                raise ValueError(
                    f"{path}: {name} of layer {layer} are not 0 behind the {length} tokens of row "
                    f"{row}"
                )
