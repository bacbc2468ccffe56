"""The page of several training runs beside each other."""

from collections.abc import Sequence
from typing import Any

from nemotron_v3.pages.chart import Line, Lines
from nemotron_v3.pages.page import Block, Page, Tab, Table
from nemotron_v3.pages.read import Run
from nemotron_v3.pages.run import GIB, facts_of, line_of, tokens_at
from nemotron_v3.pages.state import state_of
from nemotron_v3.pages.thin import smooth, smoothing_steps

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
        facts={"runs": str(len(runs))},
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


def _curves(names: Sequence[str], runs: Sequence[Run]) -> list[Block]:
    found: list[Block] = []
    smoothed = []
    for number, (name, run) in enumerate(zip(names, runs, strict=True)):
        loss = run.metrics.column("loss")
        if loss.values:
            values = smooth(loss.values, smoothing_steps(len(loss.values)))
            tokens = tokens_at(run.metrics, loss.steps)
            smoothed.append(Line(name, loss.steps, values, tokens, colour=number))
    if smoothed:
        found.append(
            Lines("Training loss, smoothed", "nats a token", smoothed, log=False, form=".4f")
        )
    told: list[tuple[str, str, str, dict[str, Any]]] = [
        ("validation_loss", "Validation loss", "nats a token", {"log": False, "form": ".4f"}),
        ("learning_rate", "Learning rate", "", {}),
        ("gradient_norm", "Gradient norm, before clipping", "", {"log": True}),
        ("tokens_per_second", "Speed", "tokens a second", {"form": ",.0f", "zero": True}),
        ("mfu", "Model FLOPs utilisation", "%", {"form": ".1f", "zero": True}),
        ("memory_bytes", "Memory, the most so far", "GiB", {"form": ".3~f", "zero": True}),
        ("experts/entropy", "Entropy of the experts' load, mean of the routers", "", {}),
    ]
    scales = {"mfu": 100.0, "memory_bytes": 1 / GIB}
    for column, title, unit, more in told:
        look = "points" if column == "validation_loss" else "line"
        lines = [
            line_of(
                run.metrics, run.metrics.column(column), name,
                look=look, colour=number, scale=scales.get(column, 1.0),
            )
            for number, (name, run) in enumerate(zip(names, runs, strict=True))
            if run.metrics.column(column).values
        ]  # fmt: skip
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
