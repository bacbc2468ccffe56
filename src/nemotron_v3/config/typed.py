"""A JSON object as the dataclass that it was written from, each value of the type that is declared.

What this package reads back may have been changed since, or come from somebody else: a number in
the place of a list would be found out far from the file.
"""

import dataclasses
import math
import types
import typing
from collections.abc import Mapping
from typing import Any, TypeVar, get_args, get_origin

Made = TypeVar("Made")
_NAMES = {int: "an integer", float: "a number", bool: "true or false", str: "text"}


def from_object(kind: type[Made], told: Any, where: str, *, null_is_nan: bool = False) -> Made:
    """An object of JSON as a dataclass, with dataclasses, lists and objects inside it.

    Keys that are no field are left out; every field has to be there.

    Args:
        kind: a dataclass whose fields are `int`, `float`, `bool`, `str`, one of these or None,
            `list[...]`, `dict[str, ...]`, dataclasses or `Any`.
        told: as `json` reads it.
        where: the place, for errors.
        null_is_nan: whether a `float` may be null, which is NaN then.

    Raises:
        ValueError: a field that is missing, or a value of another type, with its place; what the
            dataclass itself refuses.
    """
    if not isinstance(told, Mapping):
        raise ValueError(f"{where} is {told!r:.60}: an object is needed")
    hints = typing.get_type_hints(kind)
    names = [field.name for field in dataclasses.fields(typing.cast(Any, kind)) if field.init]
    if missing := [name for name in names if name not in told]:
        raise ValueError(f"{where} lacks {', '.join(missing)}")
    values = {
        name: _value(told[name], hints[name], f"{where}.{name}", null_is_nan) for name in names
    }
    return kind(**values)


def _value(told: Any, hint: Any, where: str, null_is_nan: bool) -> Any:
    origin, args = get_origin(hint), get_args(hint)
    if hint is Any:
        return told
    if origin in (typing.Union, types.UnionType):
        (other,) = (arg for arg in args if arg is not types.NoneType)
        return None if told is None else _value(told, other, where, null_is_nan)
    if dataclasses.is_dataclass(hint):
        return from_object(typing.cast(type, hint), told, where, null_is_nan=null_is_nan)
    if origin is list and isinstance(told, list):
        each = ((f"{where}[{i}]", value) for i, value in enumerate(told))
        return [_value(value, args[0], place, null_is_nan) for place, value in each]
    if origin is dict and isinstance(told, Mapping):
        return {n: _value(v, args[1], f"{where}.{n}", null_is_nan) for n, v in told.items()}
    if hint is float and type(told) in (int, float):
        return float(told)
    if hint is float and told is None and null_is_nan:
        return math.nan
    if type(told) is hint:
        return told
    needed = {list: "a list", dict: "an object"}.get(origin) or _NAMES.get(hint, str(hint))
    raise ValueError(f"{where} is {told!r:.60}: {needed} is needed")
