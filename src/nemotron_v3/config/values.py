"""Codecs: how one value of a config is read, checked and written back.

`read(key, value)` takes what a file, a keyword or an attribute holds and gives the typed value.
It is idempotent, and its `ValueError` shows the key, the value and the way out. `write(value,
was, key)` gives the JSON value to store under `key`, spelled like `was`: what the source held
there, `None` where it held nothing.
"""

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Generic, TypeVar, cast

import torch

from nemotron_v3.config.blocks import (
    RELEASED,
    canonical_block_type,
    parse_pattern,
    to_pattern,
    vocabulary_of,
)

Given = TypeVar("Given")
Typed = TypeVar("Typed")

MOST_BLOCKS = 10_000
_FP32_MAX = torch.finfo(torch.float32).max
INFINITY = "Infinity"  # a string: strict JSON has no number for it
_MARKED_FLOAT = "__float__"  # transformers 5 writes infinity as {"__float__": "Infinity"}


def _as_it_is(value: Any, was: Any, key: str) -> Any:
    return value


@dataclass(frozen=True)
class Codec(Generic[Given, Typed]):
    """Reader and writer of one kind of value; `optional` ones take `None` as a value."""

    read: Callable[[str, Given], Typed]
    write: Callable[[Typed, Any, str], Any] = _as_it_is
    optional: bool = False

    def __call__(self, value: Given) -> Typed:
        """`read`, as a type checker sees a field's converter."""
        return self.read("value", value)


def optional(codec: Codec[Given, Typed]) -> Codec[Given | None, Typed | None]:
    """`codec` with `None` as one more value."""

    def read(key: str, value: Given | None) -> Typed | None:
        return None if value is None else codec.read(key, value)

    def write(value: Typed | None, was: Any, key: str) -> Any:
        return None if value is None else codec.write(value, was, key)

    return Codec(read, write, optional=True)


def filled(codec: Codec[Given, Typed]) -> Codec[Given | None, Typed]:
    """`optional`, of a field whose `None` the config replaces before anybody reads it."""
    return cast(Codec[Given | None, Typed], optional(codec))


def whole(minimum: int) -> Codec[int, int]:
    """A whole number of at least `minimum`."""

    def read(key: str, value: int) -> int:
        if isinstance(value, bool) or not isinstance(value, int) or value < minimum:
            raise ValueError(f"{key} is {value!r}: give a whole number of at least {minimum}")
        return value

    return Codec(read)


def number(minimum: float = -math.inf, below: float = math.inf) -> Codec[float, float]:
    """A finite number in [minimum, below)."""
    bounds = [f"at least {minimum:g}"] * math.isfinite(minimum)
    bounds += [f"below {below:g}"] * math.isfinite(below)
    wanted = " ".join(["a finite number", " and ".join(bounds)]).strip()

    def read(key: str, value: float) -> float:
        found = _as_float(value)
        if not math.isfinite(found) or not minimum <= found < below:
            raise ValueError(f"{key} is {value!r}: give {wanted}")
        return found

    return Codec(read)


def positive() -> Codec[float, float]:
    """A finite number above 0."""

    def read(key: str, value: float) -> float:
        found = _as_float(value)
        if not math.isfinite(found) or found <= 0:
            raise ValueError(f"{key} is {value!r}: give a finite number above 0")
        return found

    return Codec(read)


def _as_float(value: Any) -> float:
    """The number as a float, infinite where it is too large, NaN where it is no number."""
    if isinstance(value, bool) or not isinstance(value, int | float):
        return math.nan
    try:
        return float(value)
    except OverflowError:
        return math.inf if value > 0 else -math.inf


def choice(*names: str, **synonyms: str) -> Codec[str, str]:
    """One of a few words; a synonym stands for the word it is given with."""

    def read(key: str, value: str) -> str:
        found = synonyms.get(value, value) if isinstance(value, str) else value
        if found not in names:
            raise ValueError(f"{key} is {value!r}, which is not offered: use {' or '.join(names)}")
        return found

    return Codec(read)


def only(offered: Typed, instead: str = "") -> Codec[Typed, Typed]:
    """The one value that is offered; `instead` says what does the work of the others."""

    def read(key: str, value: Typed) -> Typed:
        if value != offered:
            way = f"set it to {offered!r}" + (f" and use {instead}" if instead else "")
            raise ValueError(f"{key} is {value!r}, which is not offered: {way}")
        return offered

    return Codec(read)


def _read_flag(key: str, value: bool) -> bool:
    if not isinstance(value, bool):
        raise ValueError(f"{key} is {value!r}: give true or false")
    return value


def _read_dtype(key: str, value: str | torch.dtype) -> torch.dtype:
    found = value
    if isinstance(value, str):
        found = getattr(torch, value.removeprefix("torch."), None)
    if not isinstance(found, torch.dtype) or not found.is_floating_point:
        raise ValueError(
            f"{key} is {value!r}: give a floating-point torch dtype or its name, such as 'bfloat16'"
        )
    return found


def _write_dtype(value: torch.dtype, was: Any, key: str) -> str:
    prefixed = isinstance(was, str) and was.startswith("torch.")
    return str(value) if prefixed else str(value).removeprefix("torch.")


def _read_blocks(key: str, value: str | Sequence[str]) -> tuple[str, ...]:
    if isinstance(value, str):
        return parse_pattern(key, value)
    if not isinstance(value, list | tuple):
        raise ValueError(
            f"{key} is {value!r}: give a pattern such as 'MEM*-' or a list of block types"
        )
    blocks = []
    for position, name in enumerate(value):
        try:
            blocks.append(canonical_block_type(name))
        except ValueError as error:
            raise ValueError(f"{key} at position {position}: {error}") from None
    return tuple(blocks)


def _write_blocks(value: tuple[str, ...], was: Any, key: str) -> str | list[str]:
    if isinstance(was, str) or (was is None and key.endswith("pattern")):
        return to_pattern(value)
    vocabulary = vocabulary_of(was) if was else RELEASED
    return [vocabulary[block] for block in value]


def _read_bound(key: str, value: Any) -> float:
    marked = isinstance(value, Mapping) and value.get(_MARKED_FLOAT) == INFINITY
    found = math.inf if marked or value == INFINITY else _as_float(value)
    if math.isnan(found) or found < 0:
        raise ValueError(f"{key} holds {value!r}: give numbers of at least 0, or Infinity")
    # A limit that fp32 cannot tell from infinity limits nothing, and torch.clamp refuses it.
    return math.inf if found >= _FP32_MAX else found


def _read_limit(key: str, value: Sequence[Any]) -> tuple[float, float]:
    if not isinstance(value, list | tuple) or len(value) != 2:
        raise ValueError(f"{key} is {value!r}: give two numbers, such as [0.0, Infinity]")
    low, high = (_read_bound(key, bound) for bound in value)
    if low > high or math.isinf(low):
        raise ValueError(f"{key} is {value!r}: give the smaller limit first, and a finite one")
    return low, high


def _write_limit(value: tuple[float, float], was: Any, key: str) -> list[Any]:
    old = was if isinstance(was, list | tuple) else (None, None)
    marked = any(isinstance(bound, Mapping) for bound in old)
    infinity: Any = {_MARKED_FLOAT: INFINITY} if marked else math.inf
    infinity = INFINITY if INFINITY in old else infinity
    return [
        spelled
        if spelled is not None and _read_bound(key, spelled) == bound
        else infinity
        if math.isinf(bound)
        else bound
        for bound, spelled in zip(value, old, strict=True)
    ]


def _read_token_id(key: str, value: int) -> int:
    if isinstance(value, bool) or not isinstance(value, int):
        raise ValueError(f"{key} is {value!r}: give a token id")
    return value


def _read_token_ids(key: str, value: int | Sequence[int]) -> int | list[int]:
    if isinstance(value, int):
        return _read_token_id(key, value)
    if not isinstance(value, list | tuple):
        raise ValueError(f"{key} is {value!r}: give a token id or a list of them")
    return [_read_token_id(key, token) for token in value]


flag: Codec[bool, bool] = Codec(_read_flag)
dtype: Codec[str | torch.dtype, torch.dtype] = Codec(_read_dtype, _write_dtype)
blocks: Codec[str | Sequence[str], tuple[str, ...]] = Codec(_read_blocks, _write_blocks)
limit: Codec[Sequence[Any], tuple[float, float]] = Codec(_read_limit, _write_limit)
token_id: Codec[int | None, int | None] = optional(Codec(_read_token_id))
token_ids: Codec[int | Sequence[int] | None, int | list[int] | None] = optional(
    Codec(_read_token_ids)
)
