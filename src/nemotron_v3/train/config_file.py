"""A run's configuration as a TOML file: read with every mistake named, written whole."""

import dataclasses
import difflib
import types
import typing
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Literal, TypeVar, get_args, get_origin

from nemotron_v3.config.files import read_text

MAX_BYTES = 2**20
NONE = "none"

Options = TypeVar("Options")


def read_config(
    path: Path, kind: type[Options], over: Mapping[str, Mapping[str, Any]] | None = None
) -> Options:
    """The dataclass that a TOML file spells; `over` replaces values of its tables.

    Raises:
        ValueError: no TOML, a key that nobody reads (with the nearest ones), or a value of another
            type; all of them in one message.
        OSError: the file cannot be read.
    """
    import tomllib

    try:
        table = tomllib.loads(read_text(path, MAX_BYTES))
    except (tomllib.TOMLDecodeError, RecursionError) as error:
        raise ValueError(f"{path} is no TOML: {error}") from None
    for name, values in (over or {}).items():
        below = table.get(name, {})
        if isinstance(below, dict):  # else it is told below
            table[name] = {**below, **values}
    problems: list[str] = []
    options = _dataclass("", table, kind, problems)
    if problems:
        raise ValueError("\n  - ".join([f"{path} cannot be a run's configuration:", *problems]))
    return options


def config_text(options: Any) -> str:
    """The TOML text of a dataclass, defaults included."""
    import tomli_w

    return tomli_w.dumps(as_table(options))


def as_table(options: Any) -> dict[str, Any]:
    """A dataclass as plain tables, lists and values. TOML has no null: what is None is left out,
    or "none" where leaving it out would mean something else."""
    table = {}
    for field in dataclasses.fields(options):
        value = getattr(options, field.name)
        if value is not None:
            table[field.name] = _plain(value)
        elif field.default is not None:
            table[field.name] = NONE
    return table


def _plain(value: Any) -> Any:
    if dataclasses.is_dataclass(value):
        return as_table(value)
    if isinstance(value, Mapping):
        return {str(key): _plain(each) for key, each in value.items() if each is not None}
    if isinstance(value, tuple | list):
        return [_plain(each) for each in value]
    return str(value) if isinstance(value, Path) else value


def _dataclass(where: str, table: Any, kind: type, problems: list[str]) -> Any:
    if not isinstance(table, dict):
        problems.append(f"{where} is {table!r}: a table is needed")
        return None
    hints = typing.get_type_hints(kind)
    fields = {field.name: field for field in dataclasses.fields(kind) if field.init}
    values, meant_for = {}, set[str]()
    for key, value in table.items():
        name = f"{where}.{key}" if where else key
        if key not in fields:
            near = difflib.get_close_matches(key, fields)
            meant_for.update(near)
            meant = f"did you mean {' or '.join(near)}? " if near else ""
            problems.append(f"{name} is no option: {meant}there are {', '.join(fields)}")
        else:
            values[key] = _value(name, value, hints[key], problems)
    missing = [
        name
        for name, field in fields.items()
        if name not in values
        and name not in meant_for
        and field.default is dataclasses.MISSING
        and field.default_factory is dataclasses.MISSING
    ]
    if missing:
        problems.append(f"{where or 'the file'} lacks {', '.join(missing)}")
    if problems:
        return None
    try:
        return kind(**values)
    except ValueError as error:
        problems.append(f"{where}: {error}" if where else str(error))
        return None


def _value(name: str, value: Any, hint: Any, problems: list[str]) -> Any:
    origin, args = get_origin(hint), get_args(hint)
    if origin in (typing.Union, types.UnionType):
        kinds = [arg for arg in args if arg is not type(None)]
        if value == NONE and len(kinds) < len(args):
            return None
        return _one_of(name, value, kinds, problems)
    if isinstance(hint, type) and dataclasses.is_dataclass(hint):
        return _dataclass(name, value, hint, problems)
    if origin is tuple and isinstance(value, list):
        each = args[:1] * len(value) if args[1:] == (...,) else args
        if len(each) == len(value):
            pairs = enumerate(zip(value, each, strict=True))
            return tuple(_value(f"{name}[{i}]", v, h, problems) for i, (v, h) in pairs)
    elif origin is Literal and value in args or origin is dict and isinstance(value, dict):
        return value
    elif hint is Path and isinstance(value, str):
        return Path(value)
    elif hint is float and type(value) in (int, float):
        return float(value)
    elif isinstance(hint, type) and type(value) is hint:
        return value
    problems.append(f"{name} is {value!r}: {_told(hint, origin, args)} is needed")
    return None


def _one_of(name: str, value: Any, kinds: list[Any], problems: list[str]) -> Any:
    """The value as the first of several types that takes it."""
    if len(kinds) == 1:
        return _value(name, value, kinds[0], problems)
    for kind in kinds:
        refused: list[str] = []
        taken = _value(name, value, kind, refused)
        if not refused:
            return taken
    told = " or ".join(_told(kind, get_origin(kind), get_args(kind)) for kind in kinds)
    problems.append(f"{name} is {value!r}: {told} is needed")
    return None


def _told(hint: Any, origin: Any, args: tuple[Any, ...]) -> str:
    if origin is Literal:
        return " or ".join(map(repr, args))
    if origin is tuple:
        return "a list"
    names = {int: "an integer", float: "a number", bool: "true or false", str: "a text"}
    return {**names, Path: "a path", dict: "a table"}.get(origin or hint, str(hint))
