"""Regular expressions from an adapter's config, a file from somebody else.

Python tries the ways in which an expression can match one after the other, and a short one may
have more of them than a lifetime has seconds. So the ways are counted before one is run.
"""

import re
from collections.abc import Iterable, Sequence
from re import _constants as kinds  # type: ignore[attr-defined]
from re import _parser as parser  # type: ignore[attr-defined]
from typing import Any

MAX_LENGTH = 1000  # max. characters of a pattern
# Max. match attempts over all patterns of a config: a fraction of a second for each name.
MAX_WAYS = 1_000_000
_LETTERS = 48  # max. characters of a repetition: names of modules are hardly longer


def pattern_problems(field: str, patterns: Iterable[str]) -> list[str]:
    """What is wrong with `patterns` of `field` of a config: no regular expression, or too many ways
    to try; empty where each can be run."""
    problems, total = [], 0
    for pattern in patterns:
        shown = f"{field} {pattern[:80]!r}"
        if len(pattern) > MAX_LENGTH:
            problems.append(f"{shown}... has {len(pattern)} characters: at most {MAX_LENGTH}")
            continue
        try:
            total += _ways(parser.parse(pattern))
            re.compile(rf"(.*\.)?({pattern})")  # as it is run
        except _Endless as error:
            problems.append(f"{shown} {error}, and may take for ever to match: list the modules")
        except (re.error, RecursionError, OverflowError) as error:
            problems.append(f"{shown} is no regular expression: {error}")
    if total > MAX_WAYS:
        problems.append(f"{field} takes too long to match: list the modules instead")
    return problems


class _Endless(Exception):
    pass


def _ways(items: Sequence[tuple[Any, Any]]) -> int:
    """Ways in which a parsed expression can be tried on one name, from one place on."""
    product, ahead = 1, 0
    for kind, held in items:
        if kind in (kinds.ASSERT, kinds.ASSERT_NOT):  # tried once
            ahead += _ways(held[1])
        else:
            product *= _ways_of(kind, held)
        if product + ahead > MAX_WAYS:
            raise _Endless("has too many ways to match")
    return product + ahead


def _ways_of(kind: Any, held: Any) -> int:
    match kind:
        case kinds.LITERAL | kinds.NOT_LITERAL | kinds.ANY | kinds.IN | kinds.AT:
            return 1
        case kinds.SUBPATTERN:
            return _ways(held[-1])
        case kinds.BRANCH:
            return sum(_ways(way) for way in held[1])
        case kinds.MAX_REPEAT | kinds.MIN_REPEAT:
            least, most, inner = held
            inside = _ways(inner)
            if most == 1:
                return inside + (least == 0)
            if inside > 1:
                raise _Endless("repeats what can be matched in several ways")
            return min(int(most) - int(least) + 1, _LETTERS)
    raise _Endless(f"holds {str(kind).lower()}")


def find(pattern: str, names: Iterable[str]) -> bool:
    """Whether a checked `pattern` is one of `names`, or the end of one behind a dot."""
    return any(re.fullmatch(rf"(.*\.)?({pattern})", name) for name in names)
