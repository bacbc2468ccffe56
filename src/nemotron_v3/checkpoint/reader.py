"""Reading a checkpoint lazily: headers at once, bytes through a memory map when they are needed.

Everything a header, an index or a shard's name claims is checked when the checkpoint is opened,
before any tensor is touched.
"""

import math
import mmap
import os
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, TypeVar

import torch
from torch import Tensor

from nemotron_v3.checkpoint.errors import CheckpointError
from nemotron_v3.checkpoint.header import (
    TORCH_DTYPES,
    Entry,
    open_weights,
    read_header,
    read_json,
)
from nemotron_v3.checkpoint.refuse import (
    refuse_quantised_config,
    refuse_quantised_tensors,
    refuse_without_weights,
)
from nemotron_v3.checkpoint.replace import CONFIG, INDEX, SINGLE, is_plain_name, whole_copy
from nemotron_v3.checkpoint.side_files import read_side_files
from nemotron_v3.config.files import MAX_CONFIG_BYTES

MAX_CONFIG_KEYS = 1000

_Read = TypeVar("_Read")


class Shard:
    """One safetensors file: `entries` in the order of their bytes, `metadata` its own notes.

    The file stays mapped as long as this object or a tensor from it lives, even when its name is
    given to another file meanwhile. Raises `CheckpointError` for a file that is not what it claims.
    """

    entries: dict[str, Entry]
    metadata: dict[str, str]

    def __init__(self, path: Path):
        self.path = path
        with open_weights(path) as file:
            size = os.fstat(file.fileno()).st_size
            self.entries, self.metadata = read_header(file, size, path)
            # A private copy-on-write map: torch takes no read-only memory, and the file stays as
            # it is whatever is done to a tensor.
            self._map = mmap.mmap(file.fileno(), size, access=mmap.ACCESS_COPY)

    def dtype(self, name: str) -> torch.dtype:
        return TORCH_DTYPES[self.entries[name].dtype]

    def tensor(self, name: str) -> Tensor:
        """The tensor `name` on the CPU in the dtype of the file; pages are read when touched."""
        entry, dtype = self.entries[name], self.dtype(name)
        if entry.begin == entry.end:
            return torch.empty(entry.shape, dtype=dtype)
        raw = torch.frombuffer(
            self._map, dtype=torch.uint8, count=entry.end - entry.begin, offset=entry.begin
        )
        if raw.data_ptr() % dtype.itemsize:
            raw = raw.clone()
        return raw.view(dtype).view(entry.shape)

    def drop(self, name: str) -> None:
        """Let go of the memory behind the tensor `name`; reading it again fetches it from the file.

        What was written into a tensor of this shard object meanwhile is lost with it.
        """
        entry = self.entries[name]
        begin = -(-entry.begin // mmap.PAGESIZE) * mmap.PAGESIZE
        end = entry.end // mmap.PAGESIZE * mmap.PAGESIZE
        if begin < end and hasattr(mmap, "MADV_DONTNEED"):
            self._map.madvise(mmap.MADV_DONTNEED, begin, end - begin)


class Checkpoint:
    """An opened checkpoint directory: which tensors there are, where, and each one when asked for.

    `config` is config.json as parsed; `shards` maps file names to `Shard`s; `index_metadata` is
    None for a checkpoint of one file. Opened with `open_checkpoint`.
    """

    def __init__(
        self,
        path: Path,
        directory: Path,
        config: dict[str, Any],
        shards: dict[str, Shard],
        index_metadata: dict[str, Any] | None,
    ):
        self.path = path
        self.directory = directory
        self.config = config
        self.shards = shards
        self.index_metadata = index_metadata
        self._shard_of = {name: shard for shard in shards.values() for name in shard.entries}

    def __iter__(self) -> Iterator[str]:
        """The tensors' names, file by file in the order of their bytes."""
        return iter(self._shard_of)

    def __len__(self) -> int:
        return len(self._shard_of)

    def __contains__(self, name: str) -> bool:
        return name in self._shard_of

    def shape(self, name: str) -> tuple[int, ...]:
        return self._entry(name).shape

    def numel(self, name: str) -> int:
        return math.prod(self.shape(name))

    def dtype(self, name: str) -> torch.dtype:
        return TORCH_DTYPES[self._entry(name).dtype]

    def tensor(self, name: str) -> Tensor:
        """The tensor `name` on the CPU in the dtype of the file, backed by the file: not to be
        written to."""
        return self._shard_of[name].tensor(name)

    def drop(self, name: str) -> None:
        """Let go of the memory behind `name`, for peak memory's sake."""
        self._shard_of[name].drop(name)

    def _entry(self, name: str) -> Entry:
        return self._shard_of[name].entries[name]


def open_checkpoint(path: str | os.PathLike[str]) -> Checkpoint:
    """Open the checkpoint in the directory `path`: config.json with model.safetensors, or with
    model.safetensors.index.json and its shards.

    Reads headers alone. Raises `CheckpointError` for anything missing, truncated, foreign,
    contradictory, pickled or quantised, and for a directory replaced while it was being opened.
    """
    return _open_whole(Path(path), _open)


def open_with_side_files(path: str | os.PathLike[str]) -> tuple[Checkpoint, dict[str, bytes]]:
    """The same, and the contents of the files that go where the checkpoint goes."""

    def read(path: Path, directory: Path) -> tuple[Checkpoint, dict[str, bytes]]:
        return _open(path, directory), read_side_files(path, directory)

    return _open_whole(Path(path), read)


def _open_whole(path: Path, read: Callable[[Path, Path], _Read]) -> _Read:
    """What `read` makes of the directory asked for and the one that the checkpoint lies in, while
    nobody replaces it."""
    if not path.is_dir():
        way_out = (
            "give the directory it lies in"
            if path.exists()
            else "nothing is fetched from the network here: download the release, then give its "
            "directory"
        )
        raise CheckpointError(f"{str(path)!r} is not a directory: {way_out}")
    try:
        for _ in range(3):
            directory = whole_copy(path)
            before = _stamp(directory)
            try:
                found = read(path, directory)
            except (CheckpointError, OSError):
                if _stamp(directory) == before:
                    raise
            else:
                if _stamp(directory) == before:
                    return found
    except OSError as error:
        raise CheckpointError(f"{error.filename or path}: {error.strerror or error}") from error
    raise CheckpointError(
        f"{path} was replaced each time it was opened: wait for the saving to end"
    )


def _stamp(directory: Path) -> tuple[int, int, int] | None:
    """Which config.json this is: saving removes the old one first and adds the new one last."""
    try:
        stat = (directory / CONFIG).stat()
    except FileNotFoundError:
        return None
    return stat.st_dev, stat.st_ino, stat.st_mtime_ns


def _open(path: Path, directory: Path) -> Checkpoint:
    config = read_json(directory / CONFIG, MAX_CONFIG_BYTES)
    if len(config) > MAX_CONFIG_KEYS:
        raise CheckpointError(f"{directory / CONFIG}: {len(config)} keys: no model's config")
    refuse_quantised_config(directory, config)
    single, index = (directory / SINGLE).exists(), (directory / INDEX).exists()
    if single and index:
        raise CheckpointError(
            f"{directory} has both {SINGLE} and {INDEX}: remove the one that is out of date"
        )
    if not single and not index:
        refuse_without_weights(directory)
    if single:
        shards, metadata = {SINGLE: Shard(directory / SINGLE)}, None
    else:
        shards, metadata = _open_shards(directory)
    tensors = [item for shard in shards.values() for item in shard.entries.items()]
    refuse_quantised_tensors(directory, config, tensors)
    return Checkpoint(path, directory, config, shards, metadata)


def _open_shards(directory: Path) -> tuple[dict[str, Shard], dict[str, Any]]:
    where = directory / INDEX
    index = read_json(where)
    wanted, metadata = index.get("weight_map"), index.get("metadata", {})
    if not isinstance(wanted, dict) or not isinstance(metadata, dict):
        raise CheckpointError(f"{where}: needs a weight_map from tensors to files")
    files = {file if isinstance(file, str) else repr(file) for file in wanted.values()}
    if bad := [file for file in files if not is_plain_name(file)]:
        raise CheckpointError(
            f"{where} names files that are not plain names of .safetensors files beside it",
            (repr(file) for file in sorted(bad)),
        )
    if absent := [file for file in files if not (directory / file).is_file()]:
        raise CheckpointError(f"{directory} lacks files its index names", sorted(absent))
    shards = {file: Shard(directory / file) for file in sorted(files)}
    held: dict[str, str] = {}
    problems = []
    for file, shard in shards.items():
        for name in shard.entries:
            if name in held:
                problems.append(f"{name} is in both {held[name]} and {file}")
            elif wanted.get(name) is None:
                problems.append(f"{name} is in {file} but not in the index")
            held[name] = file
    for name, file in wanted.items():
        if held.get(name) != file:
            problems.append(f"{name} is not in {file}, where the index puts it")
    if problems:
        raise CheckpointError(f"{where} and the shards beside it disagree", problems)
    return shards, metadata
