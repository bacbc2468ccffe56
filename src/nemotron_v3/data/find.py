"""From a source to the files that it means."""

import glob
import os
from collections import Counter
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from nemotron_v3.data.options import Source

ENDINGS = {
    ".txt": "text",
    ".text": "text",
    ".md": "text",
    ".jsonl": "jsonl",
    ".ndjson": "jsonl",
    ".parquet": "parquet",
}
# What `Dataset.save_to_disk` and `DatasetDict.save_to_disk` leave in their folder.
_SAVED = ("state.json", "dataset_dict.json")


@dataclass(frozen=True)
class File:
    """A file as it was found; `name` is its path below the source's, with `/`.

    Of `datasets`, one stands for the whole split, and `size` counts rows.
    """

    path: str
    name: str
    format: str
    size: int
    changed: int  # nanoseconds

    def identity(self) -> list[Any]:
        return [self.name, self.format, self.size, self.changed]


@dataclass(frozen=True)
class Found:
    """The files of a source in order of their names, and how many were left out by ending."""

    files: tuple[File, ...]
    left_out: dict[str, int]


def find_files(source: Source) -> Found:
    """The files that a source means.

    Below a folder, hidden files and those with other endings are left out; the latter are counted,
    and so are links to folders and to nothing, and what is no regular file. A glob means what it
    matches.

    Raises:
        ValueError: nothing is there; a file of no known format; a folder without any.
    """
    path = Path(source.path)
    if source.format == "datasets" or (
        source.format == "auto" and any((path / name).is_file() for name in _SAVED)
    ):
        return Found((_data_set(source),), {})
    if path.is_file():
        return Found((_file(source, path, path.name),), {})
    if path.is_dir():
        return _below(source, path)
    if path.exists():
        raise ValueError(f"{path} is neither a regular file nor a folder")
    if not glob.has_magic(source.path):
        raise ValueError(
            f"{path} does not exist: give a file, a folder or a glob; for a name that the datasets "
            "library knows, give the format datasets"
        )
    matches = sorted(p for p in glob.glob(source.path, recursive=True) if os.path.isfile(p))
    if not matches:
        raise ValueError(f"the glob {source.path} matches no file")
    root = os.path.commonpath([os.path.dirname(os.path.abspath(p)) for p in matches])
    files = (_file(source, Path(p), Path(os.path.relpath(p, root)).as_posix()) for p in matches)
    return Found(tuple(files), {})


def _below(source: Source, folder: Path) -> Found:
    files, left_out = [], Counter()
    for path in folder.rglob("*"):
        name = path.relative_to(folder).as_posix()
        if any(part.startswith(".") for part in name.split("/")):
            continue
        if path.is_symlink() and not path.is_file():
            left_out["links to folders or nothing"] += 1
        if not path.is_file():
            if not path.is_dir() and not path.is_symlink():
                left_out["pipes, sockets or devices"] += 1
            continue
        known = ENDINGS.get(path.suffix.lower())
        if known is None or source.format not in ("auto", known):
            left_out[path.suffix or path.name] += 1
        else:
            files.append(_file(source, path, name))
    if not files:
        told = ", ".join(f"{count} of {ending}" for ending, count in left_out.most_common(5))
        wanted = [e for e, kind in ENDINGS.items() if source.format in ("auto", kind)]
        raise ValueError(
            f"{folder} holds no file that ends in {', '.join(wanted)} (others: {told or 'none'}): "
            "give a glob and a format for files with other endings"
        )
    return Found(tuple(sorted(files, key=lambda file: file.name)), dict(left_out))


def _file(source: Source, path: Path, name: str) -> File:
    kind = source.format if source.format != "auto" else ENDINGS.get(path.suffix.lower())
    if kind is None:
        raise ValueError(
            f"{path}: no format is known by the ending {path.suffix!r}: give the format (text, "
            "jsonl or parquet)"
        )
    found = os.stat(path)
    return File(str(path), name, kind, found.st_size, found.st_mtime_ns)


def open_data_set(path: str, split: str) -> Any:
    """A split of what `datasets` knows by this name or path.

    Raises:
        ValueError: the library is not installed, or cannot load it; there is no such split.
    """
    try:
        import datasets
    except ImportError:
        raise ValueError(
            f"{path} needs the datasets library: pip install datasets, or give a .jsonl file"
        ) from None
    try:
        if any((Path(path) / name).is_file() for name in _SAVED):
            loaded = datasets.load_from_disk(path)
        else:
            loaded = datasets.load_dataset(path)
    except Exception as error:  # of whatever class, from the library's loaders
        raise ValueError(f"the datasets library cannot load {path}: {error}") from None
    if isinstance(loaded, datasets.DatasetDict):
        if split not in loaded:
            raise ValueError(
                f"{path} has no split {split!r}: there are {', '.join(map(str, loaded))}"
            )
        loaded = loaded[split]
    return loaded


def _data_set(source: Source) -> File:
    rows = open_data_set(source.path, source.split)
    parts = [os.stat(part["filename"]) for part in rows.cache_files]
    changed = max((part.st_mtime_ns for part in parts), default=0)
    return File(source.path, source.split, "datasets", len(rows), changed)
