"""Small files that came from outside, read without trusting them.

Every JSON file beside a model is read here. Only regular files are opened, since a pipe has no end
and a device may act; no more is read than a limit allows; and what is parsed can be written again.
"""

import json
import math
import os
import re
import stat
from typing import Any, BinaryIO

MAX_JSON_BYTES = 32 * 2**20
MAX_CONFIG_BYTES = 16 * 2**20  # the largest release in 4 bits names 49,344 modules in its own
WIDEST = 40  # digits of an integer, where those outside 64 bits are taken
DEEPEST = 64  # objects and lists inside one another; what is deeper cannot be copied or written

_KINDS = (
    (stat.S_ISDIR, "a directory"),
    (stat.S_ISFIFO, "a named pipe"),
    (stat.S_ISSOCK, "a socket"),
    (stat.S_ISCHR, "a device"),
    (stat.S_ISBLK, "a device"),
)
_SURROGATE = re.compile(rb"\\u[dD][89a-fA-F]")  # JSON's escape of a surrogate, alone or in a pair
UTF8_MARK = b"\xef\xbb\xbf"
_MARKS = (UTF8_MARK, b"\xff\xfe", b"\xfe\xff")  # byte order marks of UTF-8 and UTF-16


def open_regular(path: str | os.PathLike[str]) -> BinaryIO:
    """The regular file `path`, or the one that a link leads to, opened to be read.

    Raises:
        ValueError: a directory, pipe, socket or device; none of them is waited for.
        OSError: no such file, or one that may not be read.
    """
    # Looked at before it is opened, since opening acts on some devices; and again afterwards, since
    # the name may have been given to another file meanwhile, which must not make this one wait.
    _check_regular(os.stat(path), path)
    flags = os.O_RDONLY
    for name in ("O_NONBLOCK", "O_NOCTTY", "O_CLOEXEC", "O_BINARY"):
        flags |= getattr(os, name, 0)
    descriptor = os.open(path, flags)
    try:
        _check_regular(os.fstat(descriptor), path)
        return os.fdopen(descriptor, "rb")
    except BaseException:
        os.close(descriptor)
        raise


def exists(path: str | os.PathLike[str]) -> bool:
    """Whether something that can be looked at stands at `path`, of whatever kind."""
    try:
        os.stat(path)
    except (OSError, ValueError):
        return False
    return True


def read_bytes(path: str | os.PathLike[str], limit: int = MAX_JSON_BYTES) -> bytes:
    """All bytes of the regular file `path`.

    Raises:
        ValueError: more than `limit` bytes, or no regular file.
        OSError: no such file, or one that may not be read.
    """
    with open_regular(path) as file:
        size = os.fstat(file.fileno()).st_size
        raw = b"" if size > limit else file.read(limit + 1)  # the file may have grown since
    size = max(size, len(raw))
    if size > limit:
        raise ValueError(f"{path}: {size} bytes, more than the {limit} that are read")
    return raw


def read_text(path: str | os.PathLike[str], limit: int = MAX_JSON_BYTES) -> str:
    """The text of the regular file `path`, in UTF-8.

    Raises:
        ValueError: no regular file, more than `limit` bytes, or no UTF-8.
        OSError: no such file, or one that may not be read.
    """
    return _decode(read_bytes(path, limit), str(path))


def read_object(
    path: str | os.PathLike[str], limit: int = MAX_JSON_BYTES, wide_integers: bool = False
) -> dict[str, Any]:
    """The JSON object in the regular file `path`, in UTF-8, with its byte order mark or without.

    `wide_integers` is `parse_object`'s.

    Raises:
        ValueError: no regular file, more than `limit` bytes, or what `parse_object` refuses.
        OSError: no such file, or one that may not be read.
    """
    return parse_object(read_bytes(path, limit), str(path), wide_integers)


def parse_object(raw: bytes | str, where: str, wide_integers: bool = False) -> dict[str, Any]:
    """The JSON object in `raw`; `where` stands in front of errors.

    `wide_integers` takes integers of up to `WIDEST` digits too: transformers writes int(1e30) as
    the longest text of a tokenizer that has no limit.

    `NaN`, `Infinity` and `-Infinity` are read as Python reads them, since released configs hold
    such numbers: who expects a finite one checks it.

    Raises:
        ValueError: anything but an object; a key that stands twice; a number outside 64 bits; text
            that holds half of a surrogate pair, which could not be written again; more than
            `DEEPEST` levels; mostly brackets, which would take a hundred times their size.
    """
    # A str may hold half a surrogate pair by itself; below it is refused as its escape is.
    raw = raw.encode("utf-8", "surrogatepass") if isinstance(raw, str) else raw
    raw = raw.removeprefix(UTF8_MARK)
    if raw.count(b"[") + raw.count(b"{") > len(raw) // 8 + 16:
        raise ValueError(f"{where}: mostly brackets, not the JSON of a model")
    text = _decode(raw, where)
    try:
        value = json.loads(
            text,
            object_pairs_hook=_no_twins,
            parse_int=_wide_integer if wide_integers else _integer,
            parse_float=_finite,
        )
    except (ValueError, RecursionError) as error:
        raise ValueError(f"{where}: not a whole JSON document that can be read: {error}") from None
    if not isinstance(value, dict):
        raise ValueError(f"{where}: holds a JSON {type(value).__name__}, not an object")
    _check_depth(value, where)
    if _SURROGATE.search(raw):
        _check_text(value, where)
    return value


def _check_regular(found: os.stat_result, path: str | os.PathLike[str]) -> None:
    if stat.S_ISREG(found.st_mode):
        return
    kind = next((name for test, name in _KINDS if test(found.st_mode)), "no file")
    raise ValueError(f"{path}: is {kind}: give a regular file")


def _decode(raw: bytes, where: str) -> str:
    if raw.startswith(_MARKS):
        raise ValueError(f"{where}: begins with a byte order mark: save it in UTF-8 without one")
    try:
        return raw.decode()
    except UnicodeDecodeError as error:
        raise ValueError(f"{where}: not UTF-8: {error}") from None


def _no_twins(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    found = dict(pairs)
    if len(found) != len(pairs):
        seen = set()
        twin = next(key for key, _ in pairs if key in seen or seen.add(key))
        raise ValueError(f"the key {twin[:100]!r} stands there twice")
    return found


def _integer(digits: str) -> int:
    # Counted first: turning many digits into a number takes time that grows with their square.
    if len(digits) > 20 or not -(2**63) <= (value := int(digits)) < 2**64:
        raise ValueError(f"the number {digits[:20]}... of {len(digits)} digits is not in 64 bits")
    return value


def _wide_integer(digits: str) -> int:
    if len(digits) > WIDEST:
        raise ValueError(f"the number {digits[:20]}... of {len(digits)} digits is too long")
    return int(digits)


def _finite(digits: str) -> float:
    value = float(digits)
    if math.isinf(value):
        raise ValueError(f"the number {digits[:20]}... is not in 64 bits")
    return value


def _check_depth(value: dict[str, Any], where: str) -> None:
    level: list[Any] = [value]
    for _ in range(DEEPEST):
        level = [
            inner
            for outer in level
            for inner in (outer.values() if isinstance(outer, dict) else outer)
            if isinstance(inner, dict | list)
        ]
        if not level:
            return
    raise ValueError(f"{where}: objects and lists more than {DEEPEST} deep")


def _check_text(value: dict[str, Any], where: str) -> None:
    try:
        json.dumps(value, ensure_ascii=False).encode()
    except UnicodeEncodeError as error:
        half = ascii(error.object[error.start : error.end])
        raise ValueError(
            f"{where}: holds half of a surrogate pair, {half}, which is no text"
        ) from None
