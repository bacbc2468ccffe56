"""The page of several training runs beside each other."""

from collections.abc import Sequence
from typing import Any

from nemotron_v3.pages.chart import Lines
from nemotron_v3.pages.page import Block, Page, Tab, Table
from nemotron_v3.pages.read import Run
from nemotron_v3.pages.run import GIB, facts_of, line_of, smoothed
from nemotron_v3.pages.state import state_of

ABSENT = "-"
# Options that differ between any two runs and say nothing about them.
_OF_NO_INTEREST = {"out"}


def comparison_page(runs: Sequence[Run]) -> Page:
    """A line a run in each picture, a table of their figures, and what they were asked
    differently."""
    names = names_of(runs)
    problems = [f"{n}: {told}" for n, run in zip(names, runs, strict=True) for told in run.problems]
    return Page(
        title=" / ".join(names) if len(names) <= 4 else f"{len(names)} runs",
        kind="training runs compared",
        notices=problems,
        tabs=[
            Tab("Figures", [_figures(names, runs)]),
            Tab("Curves", _curves(names, runs), "Nothing was measured in any run."),
            Tab("Differences", _differences(names, runs), "The runs were asked the same."),
        ],
    )


def names_of(runs: Sequence[Run]) -> list[str]:
    """A name for each: its folder's, or the whole path where another's folder has that name."""
    names = [run.name for run in runs]
    return [str(r.folder) if names.count(r.name) > 1 else r.name for r in runs]


def _figures(names: Sequence[str], runs: Sequence[Run]) -> Table:
    facts = [facts_of(run) for run in runs]
    labels = list(dict.fromkeys(label for told in facts for label in told))
    rows = [("state", *(state_of(run).word for run in runs))]
    rows += [(label, *(told.get(label, ABSENT) for told in facts)) for label in labels]
    return Table(("", *names), rows, numeric=frozenset(range(1, len(runs) + 1)))


# Columns with their title, unit, and how they are drawn.
_COLUMNS: tuple[tuple[str, str, str, dict[str, Any]], ...] = (
    ("loss", "Training loss, smoothed", "nats a token", {"log": False, "form": ".4f"}),
    ("validation_loss", "Validation loss", "nats a token", {"log": False, "form": ".4f"}),
    ("learning_rate", "Learning rate", "", {}),
    ("gradient_norm", "Gradient norm before clipping, smoothed", "", {"log": True}),
    ("tokens_per_second", "Speed, smoothed", "tokens a second", {"form": ",.0f", "zero": True}),
    ("mfu", "Model FLOPs utilisation, smoothed", "%", {"form": ".1f", "zero": True}),
    ("memory_bytes", "Memory, the most so far", "GiB", {"form": ".3~f", "zero": True}),
    ("experts/entropy", "Entropy of the experts' load, mean of the routers", "", {}),
)
_SCALES = {"mfu": 100.0, "memory_bytes": 1 / GIB}


def _curves(names: Sequence[str], runs: Sequence[Run]) -> list[Block]:
    found: list[Block] = []
    for column, title, unit, more in _COLUMNS:
        draw = smoothed if "smoothed" in title else line_of
        look = "points" if column == "validation_loss" else "line"
        same = {"look": look, "scale": _SCALES.get(column, 1.0)}
        lines = [
            draw(run.metrics, run.metrics.column(column), name, colour=number, **same)
            for number, (name, run) in enumerate(zip(names, runs, strict=True))
            if run.metrics.column(column).values
        ]
        if lines:
            found.append(Lines(title, unit, lines, **more))
    return found


def _differences(names: Sequence[str], runs: Sequence[Run]) -> list[Block]:
    keys = sorted({key for run in runs for key in run.config} - _OF_NO_INTEREST)
    rows = []
    for key in keys:
        values = [str(run.config[key]) if key in run.config else ABSENT for run in runs]
        if len(set(values)) > 1:
            rows.append((key, *values))
    return [Table(("option", *names), rows)] if rows else []
