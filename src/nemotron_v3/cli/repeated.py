"""Options with several values that stand there twice: tyro takes the last and drops the rest."""

import dataclasses
import typing
from collections import Counter
from collections.abc import Iterator, Sequence
from typing import Any

# Of several adapters one alone would be merged.
_ONCE = frozenset({"adapter"})


def check_repeated(verb: Any, args: Sequence[str]) -> None:
    """Raise ValueError where the arguments that a verb was read from name such an option twice."""
    names = (arg.split("=")[0].removeprefix("--") for arg in args if arg.startswith("--"))
    counts = Counter(name.replace("_", "-") for name in names)
    for name in _not_appended(verb):
        if counts[name] > 1:
            raise ValueError(
                f"--{name} stands there {counts[name]} times, and the last would be taken alone: "
                f"give it once{'' if name in _ONCE else f', with all behind it: --{name} A B'}"
            )


def _not_appended(options: Any, prefix: str = "") -> Iterator[str]:
    """The options with several values, or one that may not be dropped, that do not add up."""
    import tyro

    hints = typing.get_type_hints(type(options), include_extras=True)
    for field in dataclasses.fields(options):
        value = getattr(options, field.name)
        marks = getattr(hints[field.name], "__metadata__", ())
        name = prefix + field.name.replace("_", "-")
        if dataclasses.is_dataclass(value):
            unnamed = any(getattr(mark, "name", None) == "" for mark in marks)
            yield from _not_appended(value, prefix if unnamed else f"{name}.")
        elif tyro.conf.UseAppendAction not in marks and (isinstance(value, tuple) or name in _ONCE):
            yield name
