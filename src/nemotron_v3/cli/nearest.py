"""The options that may have been meant by one that is none."""

import difflib
from collections.abc import Sequence


def nearest(given: str, flags: Sequence[str], most: int = 3) -> list[str]:
    """Of `flags`, those that `given` abbreviates (`--optimizer.lr`), else those spelt like it.

    An option of the same group (what stands before its dot) comes before others.
    """
    group, _, name = given.lstrip("-").rpartition(".")
    found = [flag for flag in flags if _abbreviates(name, flag.lstrip("-").rpartition(".")[2])]
    inside = [flag for flag in found if flag.lstrip("-").rpartition(".")[0] == group]
    return (inside or found or difflib.get_close_matches(given, flags, most, 0.7))[:most]


def _abbreviates(short: str, name: str) -> bool:
    """Whether `short` is a name's initials, or the name without its dashes."""
    words = name.split("-")
    return len(words) > 1 and short in ("".join(word[:1] for word in words), "".join(words))
