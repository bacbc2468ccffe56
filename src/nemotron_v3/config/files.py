"""Small files that came from outside, read whole without trusting them."""

import json
import os
import stat
from pathlib import Path
from typing import Any

_KINDS = {
    stat.S_IFDIR: "a directory",
    stat.S_IFIFO: "a pipe",
    stat.S_IFSOCK: "a socket",
    stat.S_IFCHR: "a device",
    stat.S_IFBLK: "a device",
}


def read_regular(path: str | os.PathLike, limit: int) -> bytes:
    """The bytes of the regular file `path`, which a link may lead to.

    A pipe without a writer would never answer, and a device never end: both are refused unread.

    Raises:
        ValueError: not a regular file, or one of more than `limit` bytes.
        OSError: it is not there, or cannot be read.
    """
    # Opened first and looked at then: what is looked at is what is read.
    flags = os.O_RDONLY | getattr(os, "O_NONBLOCK", 0) | getattr(os, "O_BINARY", 0)
    descriptor = os.open(path, flags)
    try:
        found = os.fstat(descriptor)
        if not stat.S_ISREG(found.st_mode):
            kind = _KINDS.get(stat.S_IFMT(found.st_mode), "no regular file")
            raise ValueError(f"{path} is {kind}: put a regular file there, or remove it")
        if found.st_size <= limit:
            with os.fdopen(os.dup(descriptor), "rb") as file:
                raw = file.read(limit + 1)  # it may have grown since
            if len(raw) <= limit:
                return raw
        raise ValueError(f"{path} has more than {limit:,} bytes, too many for what it is to be")
    finally:
        os.close(descriptor)


def read_text(path: str | os.PathLike, limit: int) -> str:
    """The UTF-8 text of a regular file; raises what `read_regular` does."""
    try:
        return read_regular(path, limit).decode("utf-8")
    except UnicodeDecodeError as error:
        raise ValueError(f"{path} is no UTF-8 text: byte {error.start} fits in none") from None


def read_object(path: str | os.PathLike, limit: int) -> dict[str, Any]:
    """The JSON object in a regular file; raises what `read_regular` does."""
    return parse_object(read_text(path, limit), path)


def parse_object(text: str, where: str | os.PathLike) -> dict[str, Any]:
    """The JSON object that `text` holds; a `ValueError` that names `where` for anything else.

    Text that is mostly brackets is refused: parsed, it would take a hundred times its own size.
    """
    if text.count("[") + text.count("{") > len(text) // 8 + 16:
        raise ValueError(f"{where} holds mostly brackets, not the JSON of a checkpoint")
    try:
        data = json.loads(text)
    except (ValueError, RecursionError) as error:
        raise ValueError(f"{where} is no JSON that can be read: {error}") from None
    if not isinstance(data, dict):
        raise ValueError(f"{where} holds a JSON {type(data).__name__}, not an object")
    return data


def exists(path: Path) -> bool:
    """Whether something that can be looked at stands at `path`, of whatever kind."""
    try:
        path.stat()
    except (OSError, ValueError):
        return False
    return True
