"""Files and folders that appear whole or not at all.

Each is written under a temporary name beside its place, brought to the disk, and renamed. A kill, a
full disk or an error before the rename leaves what stood there. What a killed writer left is hidden
(`.NAME.XXXXXXXX.tmp`) and is never read. The next writer of the same place takes it over or removes
it, and puts back a folder that the killed one had moved aside; a reader does so by `settle`. A
writer locks what it writes, so that others leave that alone.
"""

import contextlib
import glob
import os
import re
import secrets
import shutil
from collections.abc import Iterator
from pathlib import Path

try:
    import fcntl
except ImportError:  # Windows: there, what a killed writer left stays
    fcntl = None

_NEW, _OLD = ".tmp", ".old"
_filled_here: set[tuple[int, int]] = set()  # device and inode of folders that are being filled
_FIRST = "0" * 8  # in a file's temporary name: what a killed writer left is found without a search


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
    with _own_file(path) as temporary:
        try:
            yield temporary
            sync(temporary)
            temporary.replace(path)
        except BaseException:
            temporary.unlink(missing_ok=True)
            raise
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
    settle(path)
    temporary = _beside(path)
    temporary.mkdir()
    written = os.stat(temporary)
    _filled_here.add((written.st_dev, written.st_ino))
    try:
        with _locked(temporary):
            yield temporary
            put_in_place(temporary, path)
    finally:
        _filled_here.discard((written.st_dev, written.st_ino))
        shutil.rmtree(temporary, ignore_errors=True)


def is_filled_here(folder: Path) -> bool:
    """Whether a folder is one that `atomic_folder` has given this process to fill, and locks."""
    found = os.stat(folder)
    return (found.st_dev, found.st_ino) in _filled_here


def put_in_place(folder: Path, path: Path) -> None:
    """Rename the written `folder` to `path` beside it, in the place of a folder that stands there.

    Two renames are needed where one stands there. After a kill between them nothing is at `path`;
    the old folder lies beside it (`.NAME.XXXXXXXX.old`), and `settle` puts it back.
    """
    settle(path)
    for inside in folder.rglob("*"):
        sync(inside)
    sync(folder)
    aside = _beside(path, _OLD)
    with _locked(path):
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
    """Clear away what killed writers of `path` left, and put back a folder that one moved aside.

    What a living writer has locked stays, and what may not be changed.
    """
    path = Path(path)
    for left in path.parent.glob(f".{glob.escape(path.name)}.*"):
        if not re.fullmatch(r"[0-9a-f]{8}\.(tmp|old)", left.name[len(path.name) + 2 :]):
            continue
        with contextlib.suppress(OSError):
            descriptor = os.open(left, os.O_RDONLY)
            try:
                if not _lock(descriptor):
                    continue
                if left.suffix == _OLD and not path.exists():
                    left.rename(path)
                elif left.is_dir():
                    shutil.rmtree(left)
                else:
                    left.unlink()
            finally:
                os.close(descriptor)


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


def _lock(descriptor: int) -> bool | None:
    """Lock an open file or folder: False where a living writer has, None where nothing can be."""
    if fcntl is None:
        return None
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        return False
    except OSError:  # a file system without locks
        return None
    return True


@contextlib.contextmanager
def _locked(folder: Path) -> Iterator[None]:
    """Within it others see that a writer of the folder lives, if it is there."""
    descriptor = None
    with contextlib.suppress(OSError):  # Windows opens no folder
        descriptor = os.open(folder, os.O_RDONLY)
        _lock(descriptor)
    try:
        yield
    finally:
        if descriptor is not None:
            os.close(descriptor)


@contextlib.contextmanager
def _own_file(path: Path) -> Iterator[Path]:
    """Give a temporary path beside `path` that is this writer's alone.

    It is the one of a killed writer, where there is one, without its content.
    """
    first, other = path.with_name(f".{path.name}.{_FIRST}{_NEW}"), _beside(path)
    if fcntl is None:  # Windows renames no file that is open
        yield other
        return
    temporary, descriptor = first, _take(first)
    if descriptor is None:
        temporary, descriptor = other, _take(other)
    try:
        yield temporary
    finally:
        if descriptor is not None:
            os.close(descriptor)


def _take(path: Path) -> int | None:
    """Make a file, or empty the one of a killed writer, and lock it; its open descriptor. None
    where it is another's."""
    try:
        descriptor, is_new = os.open(path, os.O_RDWR | os.O_CREAT | os.O_EXCL, 0o666), True
    except FileExistsError:
        try:
            descriptor, is_new = os.open(path, os.O_RDWR), False
        except OSError:  # such as a file of another user
            return None
    locked = _lock(descriptor)
    if (locked or (is_new and locked is None)) and _is_at(descriptor, path):
        os.ftruncate(descriptor, 0)
        return descriptor
    os.close(descriptor)
    return None


def _is_at(descriptor: int, path: Path) -> bool:
    """Whether an open file is still the one at `path`, which its writer may have renamed."""
    try:
        return os.path.samestat(os.fstat(descriptor), path.stat())
    except FileNotFoundError:
        return False


def _beside(path: Path, mark: str = _NEW) -> Path:
    return path.with_name(f".{path.name}.{secrets.token_hex(4)}{mark}")
