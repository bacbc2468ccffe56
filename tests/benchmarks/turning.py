"""A suite of made-up times: 2 s a step here, what its package says in another tree."""

import itertools
from collections.abc import Callable, Iterator

import nemotron_v3
from benchmarks.table import Row
from benchmarks.turns import samples

SECONDS = getattr(nemotron_v3, "SECONDS", 2.0)


def sections() -> dict[str, Callable[[], Iterator[Row]]]:
    return {"steps": _steps, "new": _new, "size": _size}


def _steps() -> Iterator[Row]:
    count = itertools.count()
    taken = samples(lambda: SECONDS + 0.001 * next(count), repeats=99, of_turn=1)
    print("a library prints this")
    yield Row("step", "1 x 8", "s", sorted(taken)[len(taken) // 2], more_is_better=False)


def _new() -> Iterator[Row]:
    if SECONDS != 2.0:
        raise ImportError("no such op here\nmore of it")
    samples(lambda: 1.0, repeats=1)
    yield Row("new op", "1 x 8", "s", 1.0)


def _size() -> Iterator[Row]:
    yield Row("peak memory", "1 x 8", "MiB", 100 * SECONDS, more_is_better=False)
