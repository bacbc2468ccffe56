"""Files and folders that appear whole or not at all.

Each is written under a temporary name beside its place, brought to the disk, and renamed. A kill, a
full disk or an error before the rename leaves what stood there. What a killed writer left is hidden
(`.NAME.XXXXXXXX.tmp`) and is never read; `settle` removes it.
"""

import contextlib
import os
import re
import secrets
import shutil
from collections.abc import Iterator
from pathlib import Path

_NEW, _OLD = ".tmp", ".old"


@contextlib.contextmanager
def atomic_file(path: str | os.PathLike) -> Iterator[Path]:
    """Give a temporary path to write a file to; on leaving it takes the place of `path`.

    Raises:
        FileNotFoundError: the folder of `path` does not exist.
        ValueError: something else than a regular file stands at `path`.
        OSError: the disk refuses, a full one included.
    """
    path = Path(path)
    if path.exists() and not path.is_file():
        raise ValueError(f"{path} is no regular file: give another name to write to")
    temporary = _beside(path)
    try:
        yield temporary
        sync(temporary)
        temporary.replace(path)
    finally:
        temporary.unlink(missing_ok=True)
    sync(path.parent)


@contextlib.contextmanager
def atomic_folder(path: str | os.PathLike) -> Iterator[Path]:
    """Give an empty folder to fill; on leaving it takes the place of `path`.

    A folder that stands there is replaced whole, and put back if that fails; it is the caller who
    knows whether it may be. The folders above are made.

    Raises:
        OSError: the disk refuses, a full one included.
    """
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = _beside(path)
    temporary.mkdir()
    try:
        yield temporary
        put_in_place(temporary, path)
    finally:
        shutil.rmtree(temporary, ignore_errors=True)


def put_in_place(folder: Path, path: Path) -> None:
    """Rename the written `folder` to `path` beside it, in the place of a folder that stands there.

    Two renames are needed where one stands there. After a kill between them nothing is at `path`;
    the old folder lies beside it (`.NAME.XXXXXXXX.old`), and `settle` puts it back.
    """
    for inside in folder.rglob("*"):
        sync(inside)
    sync(folder)
    aside = _beside(path, _OLD)
    if path.exists():
        path.rename(aside)
    try:
        folder.rename(path)
    except BaseException:
        if aside.exists():
            aside.rename(path)
        raise
    sync(path.parent)
    shutil.rmtree(aside, ignore_errors=True)


def settle(path: str | os.PathLike) -> None:
    """Clear away what killed writers of `path` left; only while nobody else writes it."""
    path = Path(path)
    for old in path.parent.glob(f".{path.name}.*{_OLD}"):
        if path.exists():
            shutil.rmtree(old)
        else:
            old.rename(path)
    for new in path.parent.glob(f".{path.name}.*{_NEW}"):
        if new.is_dir():
            shutil.rmtree(new)
        else:
            new.unlink()


def sync(path: Path) -> None:
    """Wait until the bytes of a file, or the names in a folder, are on the disk."""
    # Some file systems, and Windows, have no such thing for a folder.
    with contextlib.suppress(OSError) if path.is_dir() else contextlib.nullcontext():
        descriptor = os.open(path, os.O_RDONLY)
        try:
            os.fsync(descriptor)
        finally:
            os.close(descriptor)


def final_name(path: Path) -> str:
    """The name of a file or folder, that of its place where it still has a temporary one."""
    name = path.resolve().name
    match = re.fullmatch(rf"\.(.+)\.[0-9a-f]{{8}}{re.escape(_NEW)}", name)
    return match[1] if match else name


def _beside(path: Path, mark: str = _NEW) -> Path:
    return path.with_name(f".{path.name}.{secrets.token_hex(4)}{mark}")
