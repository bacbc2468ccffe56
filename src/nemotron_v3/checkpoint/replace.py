"""Replacing the checkpoint in a directory so that no kill, at any moment, harms it.

The new checkpoint is written whole into a hidden directory inside the target, then takes the old
one's place in steps that each are one rename, link or removal:

1. `.saving-X/` is filled and synced to disk, then renamed to `.whole-X/`. The old checkpoint is
   untouched.
2. The old config.json is removed. This is the moment of the change: from now on `whole_copy` leads
   readers to `.whole-X/`, and a reader that does not know about it finds no checkpoint at all.
3. The old weights are removed, the new files are linked into the target, config.json last, and
   `.whole-X/` is removed.

A kill before 2 leaves the old checkpoint, a kill after it the new one, and the next save first
finishes or removes what an interrupted one left. Other files in the directory are never touched.
"""

import contextlib
import os
import re
import secrets
import shutil
import warnings
from collections.abc import Iterator
from pathlib import Path

try:
    import fcntl
except ImportError:  # Windows: there, nothing keeps two processes from saving to one directory
    fcntl = None

from nemotron_v3.checkpoint.errors import CheckpointError
from nemotron_v3.checkpoint.header import read_json
from nemotron_v3.checkpoint.narrow.declared import HF_QUANT_CONFIG
from nemotron_v3.config.atomic import is_filled_here, settle, sync
from nemotron_v3.config.missing import no_config

CONFIG = "config.json"
SINGLE = "model.safetensors"
INDEX = "model.safetensors.index.json"
_SAVING = ".saving-"
_WHOLE = ".whole-"
_SHARD = re.compile(r"model-\d+-of-\d+\.safetensors")


def is_plain_name(file: object) -> bool:
    """Whether `file` is the name of a .safetensors file, and no path that leads elsewhere."""
    return (
        isinstance(file, str)
        and len(file) < 256
        and file.endswith(".safetensors")
        and not file.startswith(".")
        and not set(file) & set("/\\:\0")
    )


def whole_copy(directory: Path) -> Path:
    """Where the whole checkpoint of `directory` lies: there, or in what an interrupted save left.

    Raises `CheckpointError` where there is none.
    """
    if not directory.exists():
        settle(directory)  # a whole run may have been moved aside
    if (directory / CONFIG).exists():
        return directory
    whole = [path for path in directory.glob(f"{_WHOLE}*") if (path / CONFIG).exists()]
    if len(whole) == 1:
        warnings.warn(
            f"the last save to {directory} was interrupted while its files took their places: "
            f"reading the whole copy in {whole[0]}, which the next save there puts in place",
            stacklevel=3,
        )
        return whole[0]
    left = next(directory.glob(f"{_SAVING}*"), None)
    cause = f"; the save that {left} belongs to was interrupted before it was whole" if left else ""
    raise CheckpointError(f"{no_config(directory)}{cause}")


@contextlib.contextmanager
def replacing(directory: Path) -> Iterator[Path]:
    """Give an empty directory to fill; on leaving, its files replace the checkpoint in `directory`.

    An exception inside leaves `directory` as it was. Raises `CheckpointError` while another process
    saves to the same directory, and where `directory` is a file or holds a directory in the place
    of a file to replace.
    """
    if directory.exists() and not directory.is_dir():
        raise CheckpointError(f"{directory} is a file: give a directory to save to")
    existed = directory.exists()
    directory.mkdir(parents=True, exist_ok=True)
    with _locked(directory):
        _check_names(directory)
        _settle(directory)
        token = secrets.token_hex(4)
        saving, whole = directory / f"{_SAVING}{token}", directory / f"{_WHOLE}{token}"
        try:
            saving.mkdir()
            yield saving
            for file in saving.rglob("*"):
                sync(file)
            sync(saving)
            saving.rename(whole)
        except BaseException:
            shutil.rmtree(saving, ignore_errors=True)
            if not existed:
                with contextlib.suppress(OSError):
                    directory.rmdir()
            raise
        sync(directory)
        _install(directory, whole)


def _install(directory: Path, whole: Path) -> None:
    """Put the files of `whole` in place; can be begun again after a kill at any moment."""
    (directory / CONFIG).unlink(missing_ok=True)
    sync(directory)
    for name in _weights(directory):
        (directory / name).unlink(missing_ok=True)
    for file in whole.iterdir():
        if file.is_dir():
            _install_folder(file, directory / file.name)
        elif file.name != CONFIG:
            _link(file, directory / file.name)
    sync(directory)
    _link(whole / CONFIG, directory / CONFIG)
    sync(directory)
    shutil.rmtree(whole)


def _install_folder(whole: Path, folder: Path) -> None:
    """Put a folder's files beside those that stand there."""
    folder.mkdir(exist_ok=True)
    for file in whole.iterdir():
        _link(file, folder / file.name)
    sync(folder)


def _weights(directory: Path) -> list[str]:
    """The weights of the checkpoint in `directory` and what tells their formats; the index that
    names them comes last."""
    names = {path.name for path in directory.iterdir() if _SHARD.fullmatch(path.name)}
    if (directory / INDEX).exists():
        with contextlib.suppress(CheckpointError):
            listed = read_json(directory / INDEX).get("weight_map")
            if isinstance(listed, dict):
                names.update(file for file in listed.values() if is_plain_name(file))
    return [*sorted(names), SINGLE, HF_QUANT_CONFIG, INDEX]


def _check_names(directory: Path) -> None:
    """Raise `CheckpointError` where a directory stands in the place of a file to replace: it could
    not be removed once the old config.json was."""
    for name in (CONFIG, *_weights(directory)):
        if (directory / name).is_dir() and not (directory / name).is_symlink():
            raise CheckpointError(
                f"{directory / name} is a directory: move it away, or save to another directory"
            )


def _settle(directory: Path) -> None:
    """Finish or remove what an interrupted save left."""
    for path in directory.glob(f"{_WHOLE}*"):
        if (directory / CONFIG).exists() or not (path / CONFIG).exists():
            shutil.rmtree(path)
        else:
            _install(directory, path)
    for path in directory.glob(f"{_SAVING}*"):
        if path.is_dir():
            shutil.rmtree(path)
        else:
            path.unlink()


def _link(source: Path, target: Path) -> None:
    target.unlink(missing_ok=True)
    try:
        os.link(source, target)
    except OSError:  # a file system without hard links
        copy = target.with_name(f"{_SAVING}{target.name}")
        shutil.copyfile(source, copy)
        sync(copy)
        copy.replace(target)


@contextlib.contextmanager
def _locked(directory: Path) -> Iterator[None]:
    if fcntl is None or is_filled_here(directory):
        yield
        return
    descriptor = os.open(directory, os.O_RDONLY)
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        os.close(descriptor)
        raise CheckpointError(
            f"another process is saving to {directory}: let one process save, the others wait"
        ) from None
    except OSError:  # a file system without locks
        pass
    try:
        yield
    finally:
        os.close(descriptor)
