"""Reading a checkpoint lazily: headers at once, bytes through a memory map when they are needed.

Everything a header, an index or a shard's name claims is checked when the checkpoint is opened,
before any tensor is touched.
"""

import math
import mmap
import os
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import Any, TypeVar

import torch
from torch import Tensor

from nemotron_v3.checkpoint.errors import CheckpointError
from nemotron_v3.checkpoint.header import (
    TORCH_DTYPES,
    WEIGHT_DTYPES,
    Entry,
    open_weights,
    read_header,
    read_json,
)
from nemotron_v3.checkpoint.narrow.declared import HF_QUANT_CONFIG, read_declared
from nemotron_v3.checkpoint.narrow.layouts import Narrow, find_narrow
from nemotron_v3.checkpoint.narrow.read import row_blocks, scale_problems
from nemotron_v3.checkpoint.refuse import refuse_narrow, refuse_without_weights
from nemotron_v3.checkpoint.replace import CONFIG, INDEX, SINGLE, is_plain_name, whole_copy
from nemotron_v3.checkpoint.side_files import read_side_files
from nemotron_v3.config.files import MAX_CONFIG_BYTES, exists
from nemotron_v3.config.missing import NOT_FETCHED
from nemotron_v3.config.source import Source, of_text_model

MAX_CONFIG_KEYS = 1000
TEXT_MODEL = "language_model."
"""What the names of the text model's tensors begin with in a model of several modes."""
WRAPPERS = ("module.", "_orig_mod.")
"""What DistributedDataParallel and torch.compile put before every name."""

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
        """Free the memory behind the tensor `name`; reading it again fetches it from the file.

        What was written into a tensor of this shard object meanwhile is lost with it.
        """
        entry = self.entries[name]
        begin = -(-entry.begin // mmap.PAGESIZE) * mmap.PAGESIZE
        end = entry.end // mmap.PAGESIZE * mmap.PAGESIZE
        if begin < end and hasattr(mmap, "MADV_DONTNEED"):
            self._map.madvise(mmap.MADV_DONTNEED, begin, end - begin)


class Stored:
    """The tensors of a checkpoint as they lie in its files, `shards` by file name.

    Of a model of several modes they are those of its text model, whose names begin with `outer`,
    and are called without it; `beside` names the others.
    """

    def __init__(self, shards: dict[str, Shard], outer: str = ""):
        names = {name: shard for shard in shards.values() for name in shard.entries}
        inside = {name: shard for name, shard in names.items() if name.startswith(outer)}
        self.outer = outer
        self.beside: tuple[str, ...] = tuple(name for name in names if name not in inside)
        self._shard_of = {name.removeprefix(outer): shard for name, shard in inside.items()}

    def __iter__(self) -> Iterator[str]:
        """The tensors' names, file by file in the order of their bytes."""
        return iter(self._shard_of)

    def __len__(self) -> int:
        return len(self._shard_of)

    def __contains__(self, name: str) -> bool:
        return name in self._shard_of

    def entry(self, name: str) -> Entry:
        return self._shard_of[name].entries[self.outer + name]

    def shape(self, name: str) -> tuple[int, ...]:
        return self.entry(name).shape

    def dtype(self, name: str) -> torch.dtype:
        return TORCH_DTYPES[self.entry(name).dtype]

    def tensor(self, name: str) -> Tensor:
        """The tensor `name` on the CPU in the dtype of the file, backed by the file: not to be
        written to."""
        return self._shard_of[name].tensor(self.outer + name)

    def drop(self, name: str) -> None:
        """Free the memory behind `name`, to keep peak memory low."""
        self._shard_of[name].drop(self.outer + name)


class Checkpoint:
    """An opened checkpoint directory: which weights there are, and each one when asked for.

    A weight that the files hold in 8 or 4 bits, in several tensors, is one here, called as a wide
    one would be and of `wide_dtype`: that of the config, else bf16. `narrow` says which those are
    and what stands beside them, `stored` has the files' own tensors.

    Of a model of several modes it is the text model.

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
        stored: Stored,
        narrow: Narrow,
    ):
        self.path = path
        self.directory = directory
        self.config = config
        self.shards = shards
        self.index_metadata = index_metadata
        self.stored = stored
        self.narrow = narrow
        self.wide_dtype: torch.dtype = _dtype_of(config)
        hidden, name_of = narrow.companions, narrow.name_of
        self._names = {name_of.get(name, name): None for name in self.stored if name not in hidden}

    def __iter__(self) -> Iterator[str]:
        """The weights' names, file by file in the order of their bytes."""
        return iter(self._names)

    def __len__(self) -> int:
        return len(self._names)

    def __contains__(self, name: str) -> bool:
        return name in self._names

    def shape(self, name: str) -> tuple[int, ...]:
        narrow = self.narrow.weights.get(name)
        return self.stored.shape(name) if narrow is None else narrow.shape

    def numel(self, name: str) -> int:
        return math.prod(self.shape(name))

    def dtype(self, name: str) -> torch.dtype:
        return self.wide_dtype if name in self.narrow.weights else self.stored.dtype(name)

    def dtype_name(self, name: str) -> str:
        """Name of the stored format: "bfloat16", "nvfp4"."""
        narrow = self.narrow.weights.get(name)
        if narrow is not None:
            return narrow.layout
        return str(self.stored.dtype(name)).removeprefix("torch.")

    def tensor(self, name: str) -> Tensor:
        """The weight `name` on the CPU.

        A plain one is backed by the file: do not write to it. A quantised one is dequantised and
        rounded once to `wide_dtype`.
        """
        if name not in self.narrow.weights:
            return self.stored.tensor(name)
        values = torch.empty(self.shape(name), dtype=self.wide_dtype)
        self.copy_to(name, values)
        return values

    def copy_to(self, name: str, target: Tensor) -> None:
        """Give `target` the values of `name`, rounded once, on the device that it is on."""
        narrow = self.narrow.weights.get(name)
        if narrow is None:
            source = self.stored.tensor(name)
            # A cast happens on the device, where an audit does it too.
            target.copy_(source if source.dtype == target.dtype else source.to(target.device))
            return
        for rows, values in row_blocks(self.stored, narrow, target.dtype, target.device):
            target[rows].copy_(values)

    def drop(self, name: str) -> None:
        """Free the memory behind `name`, to keep peak memory low."""
        narrow = self.narrow.weights.get(name)
        for part in (name,) if narrow is None else narrow.parts:
            self.stored.drop(part)

    def check_scales(self, names: Iterable[str]) -> None:
        """Raise `CheckpointError` where a scale of the narrow weights among `names` is no number to
        multiply by; reads scales alone."""
        weights = [self.narrow.weights[name] for name in names if name in self.narrow.weights]
        if problems := scale_problems(self.stored, weights):
            why = "a quantiser writes no such scales"
            refuse_narrow(self.directory, self.config, why, problems)


def _dtype_of(config: dict[str, Any]) -> torch.dtype:
    """The dtype that a config gives narrow weights: what it says of all weights, else bf16."""
    config = of_text_model(Source(config)).data
    for key in ("dtype", "torch_dtype"):
        named = config.get(key)
        found = (
            getattr(torch, named.removeprefix("torch."), None) if isinstance(named, str) else None
        )
        if found is not None and found in WEIGHT_DTYPES.values():
            return found
    return torch.bfloat16


def open_checkpoint(path: str | os.PathLike[str]) -> Checkpoint:
    """Open the checkpoint in the directory `path`: config.json with model.safetensors, or with
    model.safetensors.index.json and its shards.

    Reads headers alone. Raises `CheckpointError` for anything missing, truncated, foreign,
    contradictory or pickled, for weights in 8 or 4 bits that are not whole, and for a directory
    replaced while it was being opened.
    """
    return _open_whole(Path(path), _open)


def open_with_side_files(
    path: str | os.PathLike[str], narrow: bool = False
) -> tuple[Checkpoint, dict[str, bytes]]:
    """The same, and the contents of the files that go where the checkpoint goes; with `narrow`
    what tells the formats of its weights is one of them."""

    def read(path: Path, directory: Path) -> tuple[Checkpoint, dict[str, bytes]]:
        return _open(path, directory), read_side_files(path, directory, narrow)

    return _open_whole(Path(path), read)


def _open_whole(path: Path, read: Callable[[Path, Path], _Read]) -> _Read:
    """What `read` makes of the directory asked for and the one that the checkpoint lies in, while
    nobody replaces it."""
    if not path.is_dir():
        if not path.exists():
            raise CheckpointError(f"{str(path)!r} does not exist: {NOT_FETCHED}")
        raise CheckpointError(f"{str(path)!r} is not a directory: give the directory it lies in")
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
    stored = Stored(shards, _outer(directory, shards))
    narrow = _find_narrow(directory, config, stored)
    return Checkpoint(path, directory, config, shards, metadata, stored, narrow)


def _outer(directory: Path, shards: dict[str, Shard]) -> str:
    """What the names of the text model's tensors begin with in a model of several modes.

    Raises `CheckpointError` for the names of a wrapper.
    """
    names = [name for shard in shards.values() for name in shard.entries]
    if wrapper := next((w for w in WRAPPERS if names and names[0].startswith(w)), None):
        raise CheckpointError(
            f"{directory}: its tensors are called as a wrapper calls them, {names[0]} for "
            f"{names[0].removeprefix(wrapper)}: save the model inside it (model."
            f"{wrapper.removesuffix('.')}), or rename them"
        )
    return TEXT_MODEL if any(name.startswith(TEXT_MODEL) for name in names) else ""


def _find_narrow(directory: Path, config: dict[str, Any], stored: Stored) -> Narrow:
    """The narrow weights among the tensors, and nothing about them that is wrong."""
    entries = {name: stored.entry(name) for name in stored}
    narrow, problems = find_narrow(entries)
    if problems:
        why = "they are of no layout that is known here"
        refuse_narrow(directory, config, why, problems)
    beside = directory / HF_QUANT_CONFIG
    try:
        declarations = read_declared(config, read_json(beside) if exists(beside) else None)
        problems = [
            p for declared in declarations for p in declared.problems(narrow, entries, stored.outer)
        ]
    except CheckpointError:
        raise
    except ValueError as error:
        refuse_narrow(directory, config, str(error))
    if problems:
        raise CheckpointError(
            f"{directory}: what is said of {len(problems)} quantised weights contradicts the "
            "tensors: fetch the files again; or remove quantization_config and "
            f"{HF_QUANT_CONFIG}, since the tensors alone say what they are",
            problems,
        )
    return narrow


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
