"""What the verbs take, read from their dataclasses as tyro reads them."""

import ast
import dataclasses
import importlib
import inspect
import textwrap
import types
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any, Literal, Union, get_args, get_origin, get_type_hints

import tyro

from nemotron_v3.cli.verbs import VERBS

# `Positional[X]` is `Annotated[X, mark]`, and so are the others.
_POSITIONAL = get_args(tyro.conf.Positional[int])[1]
_APPEND = get_args(tyro.conf.UseAppendAction[tuple[int, ...]])[1]
_OMIT_PREFIXES = get_args(tyro.conf.OmitArgPrefixes[int])[1]
_SUPPRESS = get_args(tyro.conf.Suppress[int])[1]


@dataclass(frozen=True)
class Choices:
    """In an annotation: values to complete, though others may be right too."""

    values: tuple[str, ...]


@dataclass(frozen=True)
class Option:
    """An option, or a positional argument, whose `flag` is None.

    `values` are what may stand there: None for a file, empty for anything. `takes_value` is False
    for a switch.
    """

    name: str
    flag: str | None
    help: str
    takes_value: bool = True
    values: tuple[str, ...] | None = ()
    repeatable: bool = False


@dataclass(frozen=True)
class VerbOptions:
    """A verb with all that it takes."""

    name: str
    summary: str
    options: tuple[Option, ...]


def read_verb(verb: str) -> VerbOptions:
    """What `verb` takes, in order."""
    cls = getattr(importlib.import_module(f"nemotron_v3.cli.{verb}"), VERBS[verb])
    summary = " ".join(inspect.cleandoc(cls.__doc__).split("\n\n")[0].split())
    options = (*_of_class(cls), Option("help", "--help", "show the options", takes_value=False))
    return VerbOptions(verb, summary, options)


def _of_class(cls: type, prefix: str = "", plain: bool = False) -> Iterator[Option]:
    """The options of a dataclass; `plain` where no prefix says which one below it they are of."""
    hints, helps = get_type_hints(cls, include_extras=True), _field_docs(cls)
    for field in dataclasses.fields(cls):
        yield from _of_field(field, hints[field.name], helps.get(field.name, ""), prefix, plain)


def _field_docs(cls: type) -> dict[str, str]:
    """The string that stands behind each field, by the field's name."""
    (node,) = ast.parse(textwrap.dedent(inspect.getsource(cls))).body
    assert isinstance(node, ast.ClassDef)
    found = {}
    for field, doc in zip(node.body, node.body[1:], strict=False):
        match field, doc:
            case (
                ast.AnnAssign(target=ast.Name(id=name)),
                ast.Expr(value=ast.Constant(value=str(text))),
            ):
                found[name] = " ".join(text.split())
    return found


def _of_field(field: Any, hint: Any, help_text: str, prefix: str, plain: bool) -> Iterator[Option]:
    marks, inner = _unwrap(hint)
    if _SUPPRESS in marks:
        return
    name = prefix + field.name.replace("_", "-")
    if isinstance(inner, type) and dataclasses.is_dataclass(inner):
        if _is_sequence(hint):
            return  # numbered ones, which a file spells
        plain = plain or _OMIT_PREFIXES in marks
        named = not any(getattr(mark, "name", None) == "" for mark in marks)
        yield from _of_class(inner, f"{name}." if named and not plain else prefix, plain)
        return
    if get_origin(inner) is dict:
        return  # a table of a file
    if inner is bool:
        stem = "no-" if field.default is True else ""
        flag = f"--{prefix}{stem}{name.removeprefix(prefix)}"
        yield Option(name, flag, help_text, takes_value=False)
        return
    values: tuple[str, ...] | None = ()
    if get_origin(inner) is Literal:
        values = tuple(map(str, get_args(inner)))
    elif inner is Path:
        values = None
    for mark in marks:
        if isinstance(mark, Choices):
            values = mark.values
    flag = None if _POSITIONAL in marks else f"--{name}"
    yield Option(name, flag, help_text, values=values, repeatable=_APPEND in marks)


def _is_sequence(hint: Any) -> bool:
    """Whether a field holds any number of values."""
    if get_origin(hint) is Annotated:
        return _is_sequence(get_args(hint)[0])
    return get_origin(hint) in (tuple, list)


def _unwrap(hint: Any) -> tuple[tuple[Any, ...], Any]:
    """The marks of an annotation, and the type of one value, without None and tuples.

    Of several types it is the one with words to complete, as of `int | Literal["auto"]`.
    """
    if get_origin(hint) is Annotated:
        inner, *marks = get_args(hint)
        more, inner = _unwrap(inner)
        return (*marks, *more), inner
    if get_origin(hint) in (Union, types.UnionType):
        choices = [choice for choice in get_args(hint) if choice is not type(None)]
        literals = [choice for choice in choices if get_origin(choice) is Literal]
        if len(choices) == 1 or not literals:
            return _unwrap(choices[0])
        # Words beside a number: the words can be completed, the number is the user's.
        (other,) = (choice for choice in choices if choice not in literals)
        words = tuple(str(word) for literal in literals for word in get_args(literal))
        marks, inner = _unwrap(other)
        return (Choices(words), *marks), inner
    if get_origin(hint) is tuple:
        return _unwrap(get_args(hint)[0])
    return (), hint
