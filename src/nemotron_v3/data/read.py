"""From files to records, in units that are read apart from one another and in bounded memory.

A unit is a stretch of one file. Where it begins and ends depends on the file alone, never on who
reads it, so that any number of processes gives the same records in the same order.
"""

import functools
import json
import os
import re
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any, BinaryIO

from nemotron_v3.config.files import open_regular
from nemotron_v3.data.find import File, open_data_set

UNIT_BYTES = 2**20
UNIT_ROWS = 512
LONGEST_LINE = 2**28
"""Bytes of a line of JSON; a longer one is a bad line."""
CHAT_EXTRAS = ("tools", "chat_template_kwargs")
"""What a chat's row may hold for its template, beside the messages."""
_BOM = b"\xef\xbb\xbf"
_LINE_STARTS = re.compile(rb"\n(?=[0-9A-Za-z\xc3-\xf4])")


@dataclass(frozen=True)
class Unit:
    """`start` and `end` count bytes, or rows of a row group or data set. Within `reach` bytes
    behind each a text's parts are parted."""

    file: File
    start: int
    end: int
    group: int = 0
    reach: int = UNIT_BYTES // 4


@dataclass(frozen=True)
class Record:
    """One line or row: an object, or why it is none; neither for a blank line. `line` counts from
    1 in its unit."""

    line: int
    value: dict[str, Any] | None
    why: str = ""


def units_of(file: File, field: str) -> list[Unit]:
    """The units of a file in their order; none for an empty one.

    Raises:
        ValueError: a Parquet file or data set without the column `field`, or that cannot be read.
    """
    if file.format == "parquet":
        return _row_groups(file, field)
    if file.format == "datasets":
        _check_columns(file, open_data_set(file.path, file.name).column_names, field)
    size = UNIT_ROWS if file.format == "datasets" else UNIT_BYTES
    return [
        Unit(file, start, min(start + size, file.size), reach=size // 4)
        for start in range(0, file.size, size)
    ]


def column_of(names: list[str], field: str) -> str | None:
    """Which of a record's keys holds the document: `field`, or `messages` for the default."""
    if field in names:
        return field
    return "messages" if field == "text" and "messages" in names else None


def read_text_part(unit: Unit) -> str:
    """The text of a unit of a text file.

    A file's parts begin at lines that begin with a letter or digit, where tokenisers do not join
    what is before with what is behind. Where no such line is near, a part begins at any character.

    Raises:
        ValueError: bytes that are no text.
    """
    with _open(unit.file) as file:
        start, end = (_border(file, mark, unit) for mark in (unit.start, unit.end))
        file.seek(start)
        raw = file.read(end - start)
    if b"\0" in raw:
        raise ValueError("holds NUL bytes: a binary file, or text in UTF-16")
    try:
        text = raw.decode()
    except UnicodeDecodeError as error:
        value = raw[error.start]
        raise ValueError(f"not UTF-8: byte 0x{value:02x} at {start + error.start}") from None
    return text.removeprefix("\ufeff") if start == 0 else text


def read_records(unit: Unit, field: str) -> Iterator[Record]:
    """The lines or rows that begin in a unit."""
    if unit.file.format == "jsonl":
        return _lines(unit)
    if unit.file.format == "parquet":
        return _parquet_rows(unit, field)
    return _data_set_rows(unit, field)


def _open(file: File) -> BinaryIO:
    opened = open_regular(file.path)
    found = os.fstat(opened.fileno())
    if (found.st_size, found.st_mtime_ns) != (file.size, file.changed):
        opened.close()
        raise RuntimeError(f"{file.path} changed while it was read: start again")
    return opened


def _border(file: BinaryIO, mark: int, unit: Unit) -> int:
    """Where the part begins that stands at or behind byte `mark`."""
    if mark in (0, unit.file.size):
        return mark
    file.seek(mark - 1)
    raw = file.read(unit.reach)
    for match in _LINE_STARTS.finditer(raw):
        first = raw[match.end() : match.end() + 4].decode(errors="ignore")[:1]
        if first.isalnum():
            return mark + match.start()
    if mark - 1 + len(raw) >= unit.file.size:
        return unit.file.size
    continued = next(i for i in range(1, len(raw)) if i > 4 or raw[i] & 0xC0 != 0x80)
    return mark - 1 + continued


def _lines(unit: Unit) -> Iterator[Record]:
    with _open(unit.file) as file:
        place = unit.start
        if place:
            file.seek(place - 1)
            place += _length_of_line(file) - 1
        number = 0
        while place < unit.end:
            raw = file.readline(LONGEST_LINE)
            whole = len(raw) < LONGEST_LINE or raw.endswith(b"\n")
            place += len(raw) if whole else len(raw) + _length_of_line(file)
            number += 1
            if not whole:
                yield Record(number, None, f"longer than {LONGEST_LINE} bytes")
            elif raw.strip():
                yield _parsed(number, raw.removeprefix(_BOM) if place == len(raw) else raw)
            else:
                yield Record(number, None)


def _length_of_line(file: BinaryIO) -> int:
    """Bytes to the end of the line, read over in parts."""
    length = 0
    while part := file.readline(2**20):
        length += len(part)
        if part.endswith(b"\n"):
            break
    return length


def _parsed(number: int, raw: bytes) -> Record:
    try:
        value = json.loads(raw.strip().decode(), object_pairs_hook=_object)
    except UnicodeDecodeError as error:
        return Record(number, None, f"not UTF-8: byte 0x{raw[error.start]:02x} at {error.start}")
    except json.JSONDecodeError as error:
        return Record(number, None, f"not JSON: {error.msg} at column {error.colno}")
    except (ValueError, RecursionError) as error:
        return Record(number, None, f"not JSON that can be read: {error}")
    if not isinstance(value, dict):
        return Record(number, None, f"a JSON {type(value).__name__}, not an object")
    return Record(number, value)


def _object(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    """An object of JSON, without a key that would take another's place."""
    value = dict(pairs)
    if len(value) < len(pairs):
        keys = [key for key, _ in pairs]
        twice = next(key for key in keys if keys.count(key) > 1)
        raise ValueError(f"the key {twice!r:.60} stands there twice")
    return value


def _row_groups(file: File, field: str) -> list[Unit]:
    try:
        import pyarrow
        import pyarrow.parquet
    except ImportError:
        raise ValueError(f"{file.path} needs pyarrow: pip install pyarrow") from None
    try:
        with open_regular(file.path) as opened, pyarrow.parquet.ParquetFile(opened) as parquet:
            _check_columns(file, parquet.schema_arrow.names, field)
            sizes = [parquet.metadata.row_group(i).num_rows for i in range(parquet.num_row_groups)]
    except pyarrow.ArrowException as error:
        raise ValueError(f"{file.path} is no Parquet file that can be read: {error}") from None
    return [Unit(file, 0, rows, group) for group, rows in enumerate(sizes) if rows]


def _parquet_rows(unit: Unit, field: str) -> Iterator[Record]:
    import pyarrow.parquet

    with _open(unit.file) as opened, pyarrow.parquet.ParquetFile(opened) as parquet:
        columns = _columns(parquet.schema_arrow.names, field)
        number = 0
        for batch in parquet.iter_batches(UNIT_ROWS, [unit.group], columns, use_threads=False):
            for value in batch.to_pylist():
                number += 1
                yield Record(number, value)


def _data_set_rows(unit: Unit, field: str) -> Iterator[Record]:
    rows = _opened_data_set(unit.file.path, unit.file.name, field)[unit.start : unit.end]
    for number, values in enumerate(zip(*rows.values(), strict=True), 1):
        yield Record(number, dict(zip(rows, values, strict=True)))


@functools.lru_cache(maxsize=4)
def _opened_data_set(path: str, split: str, field: str) -> Any:
    rows = open_data_set(path, split)
    # Others may be costly to decode, as images are.
    return rows.select_columns(_columns(rows.column_names, field))


def _columns(names: list[str], field: str) -> list[str]:
    """The columns that make a document."""
    return [name for name in (column_of(names, field), *CHAT_EXTRAS) if name in names]


def _check_columns(file: File, names: list[str], field: str) -> None:
    for name in (column_of(names, field), *CHAT_EXTRAS):
        if names.count(str(name)) > 1:
            raise ValueError(f"{file.path} has {names.count(str(name))} columns {name!r}: give one")
    if column_of(names, field) is None:
        raise ValueError(
            f"{file.path} has no column {field!r}: give the field of one of {', '.join(names)}"
        )
