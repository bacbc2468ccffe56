"""Where a config came from, and how its text is read and mended."""

import json
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from nemotron_v3.config.files import parse_object

_BLANKS = frozenset(" \t\r\n")


@dataclass(frozen=True)
class Source:
    """The mapping that a config was read from and, when that was a file, the file's text."""

    data: dict[str, Any]
    text: str | None = None


@dataclass(frozen=True)
class Untyped:
    """A foreign object that a config was read from, which may leave things unsaid.

    Attributes:
        num_hidden_layers: what it announced, which counts where it named no block types.
        of_a_part: whether a part of a model read it, which believes the announced number.
    """

    num_hidden_layers: int | None = None
    of_a_part: bool = False


TEXT_MODELS = ("text_config", "llm_config", "language_config")
"""Where the config of a model of several modes holds that of its text model."""


def of_text_model(source: Source) -> Source:
    """The config of the text model inside a config of several modes; else `source` itself.

    Raises `ValueError` where there are two.
    """
    whole = source.data
    nested = {key: whole[key] for key in TEXT_MODELS if isinstance(whole.get(key), dict)}
    if not nested:
        return source
    if len(nested) > 1:
        raise ValueError(f"{' and '.join(nested)} both hold a text model: remove one of them")
    (data,) = nested.values()
    dtypes = {key: whole[key] for key in ("dtype", "torch_dtype") if key in whole}
    return Source(data if {"dtype", "torch_dtype"} & data.keys() else data | dtypes)


def plain_json(data: Mapping[str, Any]) -> dict[str, Any]:
    """A deep copy of `data` as a file can hold it; a torch dtype becomes its name."""

    def spell(value: Any) -> str:
        text = str(value)
        if text.startswith("torch."):
            return text.removeprefix("torch.")
        raise ValueError(f"config value {value!r} cannot be written as JSON: give plain values")

    try:
        text = json.dumps(dict(data), default=spell)
    except RecursionError:
        raise ValueError("the config holds values too deep to be written as JSON") from None
    return parse_object(text, "the config")


def patch_json_text(text: str, changes: Mapping[str, Any]) -> str:
    """The text of a JSON object with `changes` applied and every other byte as it was.

    A key that stands there gets its new value; the others are added behind the last one.
    """
    spans, indent = _members(text)
    pieces, position = [], 0
    for key, (start, end) in spans.items():
        if key in changes:
            pieces += [text[position:start], _dump(changes[key], indent)]
        else:
            pieces.append(text[position:end])
        position = end
    separator = f",\n{indent}" if indent else ", "
    for key, value in changes.items():
        if key not in spans:
            pieces.append(f"{separator}{json.dumps(key)}: {_dump(value, indent)}")
    return "".join(pieces) + text[position:]


def cut_text(text: str, key: str) -> str:
    """The text of a JSON object without its member `key`, and every other byte as it was."""
    spans, _ = _members(text)
    keys = list(spans)
    position, end = keys.index(key), spans[key][1]
    if position:
        return text[: spans[keys[position - 1]][1]] + text[end:]
    end = _skip_blank(text, end)
    return text[: text.index("{") + 1] + text[end + (text[end] == ",") :]


def _members(text: str) -> tuple[dict[str, tuple[int, int]], str]:
    """Where the values of the outermost object stand in `text`, and its indentation.

    `text` holds one object with at least one member.
    """
    decode = json.JSONDecoder().raw_decode
    opening = text.index("{") + 1
    position = _skip_blank(text, opening)
    _, _, indent = text[opening:position].rpartition("\n")
    spans = {}
    while text[position] != "}":
        key, position = decode(text, position)
        start = _skip_blank(text, _skip_blank(text, position) + len(":"))
        _, end = decode(text, start)
        spans[key] = (start, end)
        position = _skip_blank(text, end)
        if text[position] == ",":
            position = _skip_blank(text, position + 1)
    return spans, indent


def _skip_blank(text: str, position: int) -> int:
    while text[position : position + 1] in _BLANKS:
        position += 1
    return position


def _dump(value: Any, indent: str) -> str:
    if not indent:
        return json.dumps(value)
    return json.dumps(value, indent=indent).replace("\n", f"\n{indent}")
