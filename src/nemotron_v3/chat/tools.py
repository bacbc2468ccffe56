"""Tools that a model may call, as a chat template describes them."""

import enum
import inspect
import json
import re
import types
from collections.abc import Callable, Sequence
from typing import Any, Literal, Union, get_args, get_origin, get_type_hints

_TYPES = {int: "integer", float: "number", str: "string", bool: "boolean", types.NoneType: "null"}
_SECTION = re.compile(r"^(Args|Returns|Raises|Yields|Examples?|Notes?):[ \t]*$", re.MULTILINE)
_ARGUMENT = re.compile(r"^(\w+)(?: *\([^)]*\))?: *(.*)$")
_CHOICES = re.compile(r"\(choices:(.*?)\)\s*$", re.IGNORECASE | re.DOTALL)


def schemas(tools: Sequence[Any] | None) -> list[Any] | None:
    """The tools, with functions replaced by their schemas."""
    if tools is None:
        return None
    return [schema_of(tool) if callable(tool) else tool for tool in tools]


def schema_of(tool: Callable) -> dict[str, Any]:
    """The JSON schema of a function, as transformers writes it.

    The types come from the annotations. What it does, what its arguments are and what it gives
    back come from the docstring, in Google's form; a description may end in
    `(choices: ["a", "b"])`.

    Raises:
        TypeError: no docstring, an argument without annotation or description, an annotation that
            has no schema.
    """
    name = getattr(tool, "__name__", type(tool).__name__)
    if not (text := inspect.getdoc(tool)):
        raise _no_schema(name, "it has no docstring")
    head, *rest = _SECTION.split(text)
    sections = dict(zip(rest[::2], rest[1::2], strict=True))
    descriptions = _arguments(sections.get("Args", ""))
    try:
        hints = get_type_hints(tool if inspect.isroutine(tool) else type(tool).__call__)
    except NameError as error:
        raise _no_schema(name, f"an annotation cannot be read ({error})") from error
    properties, required = {}, []
    for parameter in inspect.signature(tool).parameters.values():
        if parameter.kind in (parameter.VAR_POSITIONAL, parameter.VAR_KEYWORD):
            raise _no_schema(name, f"it takes any number of arguments ({parameter})")
        for what, known in (("an annotation", hints), ("a description", descriptions)):
            if parameter.name not in known:
                raise _no_schema(name, f"its argument {parameter.name!r} lacks {what}")
        schema, description = _of_type(hints[parameter.name], name), descriptions[parameter.name]
        if choices := _CHOICES.search(description):
            schema["enum"] = _choices(choices[1], name)
            description = description[: choices.start()].strip()
        properties[parameter.name] = schema | {"description": description}
        if parameter.default is parameter.empty:
            required.append(parameter.name)
    parameters: dict[str, Any] = {"type": "object", "properties": properties}
    function = {"name": name, "description": head.strip(), "parameters": parameters}
    if required:
        parameters["required"] = required
    if "return" in hints:
        function["return"] = _of_type(hints["return"], name)
        if returned := sections.get("Returns", "").strip():
            function["return"]["description"] = returned
    return {"type": "function", "function": function}


def _arguments(section: str) -> dict[str, str]:
    """The descriptions in a docstring's `Args:`; a line that is indented further continues one."""
    found, last, margin = {}, "", None
    for line in filter(str.strip, section.splitlines()):
        indent = len(line) - len(line.lstrip())
        margin = indent if margin is None else margin
        argument = _ARGUMENT.match(line.strip()) if indent <= margin else None
        if argument:
            last = argument[1]
            found[last] = argument[2]
        elif last:
            found[last] = f"{found[last]} {line.strip()}".strip()
    return found


def _of_type(hint: Any, name: str) -> dict[str, Any]:
    """The schema of an annotation."""
    origin, inner = get_origin(hint), get_args(hint)
    if hint is Any:
        return {}
    if hint in _TYPES:
        return {"type": _TYPES[hint]}
    if origin is Literal:
        return _of_values(inner, hint, name)
    if isinstance(hint, type) and issubclass(hint, enum.Enum):
        return _of_values([each.value for each in hint], hint, name)
    if origin in (Union, types.UnionType):
        return _of_union(inner, name)
    if list in (hint, origin):
        return {"type": "array"} | ({"items": _of_type(inner[0], name)} if inner else {})
    if tuple in (hint, origin):
        items = [_of_type(each, name) for each in inner]
        return {"type": "array"} | ({"prefixItems": items} if items else {})
    if dict in (hint, origin):
        values = {"additionalProperties": _of_type(inner[1], name)} if inner else {}
        return {"type": "object"} | values
    raise _no_schema(name, f"its annotation {hint!r} has none")


def _of_union(inner: Sequence[Any], name: str) -> dict[str, Any]:
    parts = [_of_type(each, name) for each in inner if each is not types.NoneType]
    if len(parts) == 1:
        union = parts[0]
    elif all(list(part) == ["type"] and isinstance(part["type"], str) for part in parts):
        union = {"type": sorted(part["type"] for part in parts)}
    else:
        union = {"anyOf": parts}
    return union | ({"nullable": True} if types.NoneType in inner else {})


def _of_values(values: Sequence[Any], hint: Any, name: str) -> dict[str, Any]:
    """The schema of an annotation that lists values."""
    if not all(type(value) in _TYPES for value in values):
        raise _no_schema(name, f"its annotation {hint!r} has values that are not plain")
    kinds = list(dict.fromkeys(_TYPES[type(value)] for value in values))
    return {"type": kinds[0] if len(kinds) == 1 else kinds, "enum": list(values)}


def _choices(text: str, name: str) -> list[Any]:
    try:
        choices = json.loads(text)
    except ValueError:
        choices = None
    if not isinstance(choices, list):
        raise _no_schema(name, f"its choices {text.strip()} are no JSON list")
    return choices


def _no_schema(name: str, reason: str) -> TypeError:
    return TypeError(f"no JSON schema can be made of the tool {name!r}: {reason}; give the schema")
