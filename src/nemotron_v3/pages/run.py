"""The page of one training run."""

import json
from bisect import bisect_right
from collections.abc import Sequence
from dataclasses import replace
from typing import Any

from nemotron_v3.pages.chart import Bars, Chart, Frame, Heat, Line, Lines
from nemotron_v3.pages.page import Block, Page, Passage, Tab, Table, short
from nemotron_v3.pages.read import CONFIG, Column, Metrics, Run
from nemotron_v3.pages.state import State, length_in_words, planned_steps, state_of
from nemotron_v3.pages.thin import smooth, smoothing_steps

NORM, ENTROPY, EXCESS = "gradient_norm/", "experts/entropy/", "experts/max_violation/"
GIB = 2**30
# Cells of all heat maps of experts together, and columns of one: what a page can carry and show.
MOST_CELLS, MOST_COLUMNS = 150_000, 400
# Colours that mean the same in all pictures of a run.
TRAINING, VALIDATION = 0, 1


def run_page(run: Run, state: State | None = None, refreshed: float | None = None) -> Page:
    """The page of a run; `state` is what the training itself knows of its end."""
    state = state or state_of(run)
    metrics = run.metrics
    missing = [told for told, there in _missing(run) if not there]
    return Page(
        title=run.name,
        kind="training run",
        word="" if state.word == "unknown" else state.word,
        told=state.told,
        facts=facts_of(run),
        notices=run.problems,
        missing=missing,
        refreshed=refreshed if state.word == "running" else None,
        tabs=[
            Tab("Curves", curves(metrics), "Nothing was measured yet."),
            Tab("Routers", routers(metrics), "No loads of experts were measured."),
            Tab("Results", results(run), "No results of the run as a whole, and no samples."),
            Tab("Configuration", configuration(run), f"{CONFIG} could not be read."),
            Tab("Versions", versions(run), "run.json could not be read."),
        ],
    )


def _missing(run: Run) -> list[tuple[str, bool]]:
    """What a reader may look for, and whether it is there."""
    columns, config = run.metrics.columns, run.config
    if not columns:
        return []
    mixture = any(name.startswith("experts/") for name in columns)
    return [
        ("No loss was measured.", "loss" in columns),
        ("No learning rate was recorded.", "learning_rate" in columns),
        ("No gradient norm was recorded.", "gradient_norm" in columns),
        ("No tokens were counted.", "tokens" in columns),
        ("No speed was recorded.", "tokens_per_second" in columns),
        (
            "No MFU: the device's peak is not known. log.peak_tflops tells it.",
            "mfu" in columns,
        ),
        (
            "No validation: the run has no validation.sources."
            if not config.get("validation.sources")
            else "Validation was not measured yet.",
            "validation_loss" in columns or "held_out_bits_per_byte" in run.metrics.whole,
        ),
        (
            "No gradient norms by kind of block: log.details is 0, or no such step has come.",
            any(name.startswith(NORM) for name in columns),
        ),
        (
            "No loads of single routers: the run was written by an earlier version.",
            not mixture or bool(run.metrics.loads),
        ),
    ]


def facts_of(run: Run) -> dict[str, str]:
    """Figures at the top of the page."""
    metrics, told = run.metrics, {}
    steps, planned = metrics.last_step(), planned_steps(run.config)
    if metrics.columns:
        told["steps"] = f"{steps:,}" + (f" of {planned:,}" if planned else "")
    if (tokens := metrics.column("tokens")).values:
        told["tokens"] = f"{tokens.values[-1]:,.0f}"
    if (loss := metrics.column("loss")).values:
        told["last loss"] = f"{loss.values[-1]:.4f}"
    best = best_of(metrics.column("validation_loss"))
    if best is not None:
        told["best validation loss"] = f"{best[0]:.4f} (step {best[1]:,})"
    if (speed := metrics.column("tokens_per_second")).values:
        told["tokens a second (median)"] = f"{median(speed.values):,.0f}"
    if (mfu := metrics.column("mfu")).values:
        told["MFU (median)"] = f"{median(mfu.values):.1%}"
    if (memory := metrics.column("memory_bytes")).values:
        told["most memory"] = f"{max(memory.values) / GIB:,.2f} GiB"
    seconds = metrics.column("seconds").values
    if seconds and len(seconds) == steps:  # each step has a line
        told["time of steps"] = length_in_words(sum(x for x in seconds if x == x))
    return told


def best_of(column: Column) -> tuple[float, int] | None:
    """The least value and its step."""
    found = [(v, s) for v, s in zip(column.values, column.steps, strict=True) if v == v]
    return min(found, default=None)


def median(values: Sequence[float]) -> float:
    """The middle of the values that are numbers."""
    ordered = sorted(value for value in values if value == value)
    return ordered[len(ordered) // 2] if ordered else float("nan")


def line_of(metrics: Metrics, column: Column, name: str, **more: Any) -> Line:
    """A column as a line, with the tokens that were trained on at each of its steps."""
    scale = more.pop("scale", 1.0)
    values = column.values if scale == 1 else [value * scale for value in column.values]
    return Line(name, column.steps, values, tokens_at(metrics, column.steps), **more)


def tokens_at(metrics: Metrics, steps: Sequence[int]) -> list[float] | None:
    """The tokens behind the last line at or before each step; None where none were counted."""
    tokens = metrics.column("tokens")
    if not tokens.values:
        return None
    if tokens.steps == steps:
        return list(tokens.values)
    places = (bisect_right(tokens.steps, step) - 1 for step in steps)
    return [tokens.values[place] if place >= 0 else 0.0 for place in places]


def curves(metrics: Metrics) -> list[Block]:
    """Loss, rate, norms, speed and memory over the steps."""
    found: list[Block] = []
    loss, validation = metrics.column("loss"), metrics.column("validation_loss")
    lines = loss_lines(metrics, loss, validation)
    if lines:
        found.append(Lines("Loss", "nats a token", lines, log=False, form=".4f"))
    found += single(metrics, "learning_rate", "Learning rate")
    found += noisy(metrics, "gradient_norm", "Gradient norm, before clipping", log=False)
    norms = kinds_of(metrics, NORM)
    if norms:
        lines = [line_of(metrics, column, kind) for kind, column in norms.items()]
        found.append(Lines("Gradient norm by kind of block", "", lines, log=True))
    speed = {"unit": "tokens a second", "form": ",.0f", "zero": True}
    found += noisy(metrics, "tokens_per_second", "Speed", **speed)
    used = {"unit": "%", "form": ".1f", "zero": True, "scale": 100.0}
    found += noisy(metrics, "mfu", "Model FLOPs utilisation", **used)
    memory = {"unit": "GiB", "form": ".3~f", "zero": True, "scale": 1 / GIB}
    found += single(metrics, "memory_bytes", "Memory, the most so far", **memory)
    return found


def loss_lines(metrics: Metrics, loss: Column, validation: Column) -> list[Line]:
    """Each step's loss faint, a smoothed line over it, and the validation's points."""
    lines = with_its_mean(metrics, loss, "training, mean")
    if validation.values:
        more = {"look": "points", "colour": VALIDATION}
        lines.append(line_of(metrics, validation, "validation", **more))
    return lines


def single(
    metrics: Metrics, name: str, title: str, *, unit: str = "", scale: float = 1.0, **more: Any
) -> list[Chart]:
    """A picture of one column; none where it is not there."""
    column = metrics.column(name)
    if not column.values:
        return []
    line = line_of(metrics, column, name, scale=scale, colour=TRAINING)
    return [Lines(title, unit, [line], **more)]


def noisy(
    metrics: Metrics, name: str, title: str, *, unit: str = "", scale: float = 1.0, **more: Any
) -> list[Chart]:
    """A picture of a column of which each step differs from the next: faint, and smoothed."""
    column = metrics.column(name)
    lines = with_its_mean(metrics, column, "mean", scale)
    return [Lines(title, unit, lines, **more)] if lines else []


def with_its_mean(
    metrics: Metrics, column: Column, name: str, scale: float = 1.0, colour: int = TRAINING
) -> list[Line]:
    """A column faint, and a smoothed line over it; none where it is empty."""
    if not column.values:
        return []
    each = line_of(metrics, column, "each step", scale=scale, look="faint", colour=colour)
    mean = smoothed(metrics, column, name, scale=scale, colour=colour)
    return [each, replace(mean, name=f"{name} of about {smoothing_steps(len(column.values))}")]


def smoothed(metrics: Metrics, column: Column, name: str, **more: Any) -> Line:
    """A column as a smoothed line."""
    line = line_of(metrics, column, name, **more)
    return replace(line, values=smooth(line.values, smoothing_steps(len(line.values))))


def kinds_of(metrics: Metrics, prefix: str) -> dict[str, Column]:
    """The columns whose names begin so, by what comes behind."""
    found = {n.removeprefix(prefix): c for n, c in metrics.columns.items() if n.startswith(prefix)}
    return dict(sorted(found.items(), key=lambda item: _by_number(item[0])))


def _by_number(name: str) -> tuple[int, int, str]:
    """An order in which layer 10 comes behind layer 9, and names behind numbers."""
    return (0, int(name), "") if name.isdecimal() and name.isascii() else (1, 0, name)


def routers(metrics: Metrics) -> list[Block]:
    """How evenly the routers used their experts."""
    found: list[Block] = []
    entropies, excesses = kinds_of(metrics, ENTROPY), kinds_of(metrics, EXCESS)
    if entropies:
        frame = _frame(metrics, "", entropies, least=True)
        note = "1 is even, 0 has all tokens at one expert. A cell is the least of its steps."
        found.append(Heat("Entropy of the load", "entropy", [frame], "layer", high=1.0, note=note))
    if excesses:
        frame = _frame(metrics, "", excesses, least=False)
        note = "Above an even load, as a part of that. A cell is the greatest of its steps."
        found.append(
            Heat("Load of the most loaded expert", "excess", [frame], "layer", low=0.0, note=note)
        )
    if metrics.loads:
        frames = expert_frames(metrics)
        note = "1 is an even load. A cell is the mean of its steps."
        title = "Load of each expert, by layer"
        loads = Heat(
            title, "load", frames, "expert", scale="diverging", low=0.0, high=2.0, note=note
        )
        found.append(loads)
    found += single(metrics, "experts/entropy", "Entropy, mean of the routers", form=".4f")
    idle = "Experts without a token, of all routers"
    return found + single(metrics, "experts/idle", idle, unit="experts", form=".0f", zero=True)


def _frame(metrics: Metrics, name: str, rows: dict[str, Column], least: bool) -> Frame:
    """A row for each column; stretches of steps share a cell, which is their worst value."""
    steps = max((column.steps for column in rows.values()), key=len)
    parts = stretches(len(steps), min(MOST_COLUMNS, MOST_CELLS // max(len(rows), 1)))
    worst = min if least else max
    cells = []
    for column in rows.values():
        at = dict(zip(column.steps, column.values, strict=True))
        known = [[at[steps[i]] for i in part if at.get(steps[i], float("nan")) == at.get(steps[i])]
                 for part in parts]  # fmt: skip
        cells.append([worst(part) if part else float("nan") for part in known])
    shown = [steps[part[-1]] for part in parts]
    return Frame(name, list(rows), shown, cells, tokens_at(metrics, shown))


def expert_frames(metrics: Metrics) -> list[Frame]:
    """The load of each expert, a frame a router; a cell is the mean of a stretch of steps."""
    experts = sum(max(map(len, loads.loads), default=0) for loads in metrics.loads.values())
    columns = min(MOST_COLUMNS, max(MOST_CELLS // max(experts, 1), 2))
    frames = []
    for layer, loads in sorted(metrics.loads.items(), key=lambda item: _by_number(item[0])):
        count = max(map(len, loads.loads), default=0)
        parts = stretches(len(loads.steps), columns)
        cells = [[float("nan")] * len(parts) for _ in range(count)]
        for place, part in enumerate(parts):
            whole = [loads.loads[i] for i in part if len(loads.loads[i]) == count]
            for expert in range(count if whole else 0):
                mean = sum(load[expert] for load in whole) / len(whole)
                cells[expert][place] = mean / 100
        shown = [loads.steps[part[-1]] for part in parts]
        rows = [str(expert) for expert in range(count)]
        frames.append(Frame(f"layer {layer}", rows, shown, cells, tokens_at(metrics, shown)))
    return frames


def stretches(count: int, most: int) -> list[range]:
    """`count` numbers cut into at most `most` runs, none of them empty."""
    parts = min(count, max(most, 1))
    return [range(n * count // parts, (n + 1) * count // parts) for n in range(parts)]


def results(run: Run) -> list[Block]:
    """What was measured once, and what the model wrote."""
    found: list[Block] = []
    for name, value in run.metrics.whole.items():
        title = name.replace("_", " ")
        if isinstance(value, dict) and value and all(_is_number(v) for v in value.values()):
            bars = {title: list(value.values())}
            rows = [(str(label), short(figure)) for label, figure in value.items()]
            found.append(Bars(title, title, [str(label) for label in value], bars))
            found.append(Table(("", title), rows, numeric=frozenset({1})))
        else:
            found.append(Table(("", ""), [(title, _as_text(value))]))
    for sample in run.samples:
        step = sample.get("step")
        title = f"Sample, step {step:,}" if isinstance(step, int) else "Sample"
        found.append(Passage(title, sample["text"], _as_text(sample.get("prompt", ""))))
    return found


def _is_number(value: object) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool)


def _as_text(value: object) -> str:
    return value if isinstance(value, str) else json.dumps(value, ensure_ascii=False, default=str)


def configuration(run: Run) -> list[Block]:
    """The configuration, as it is in the folder."""
    if run.config_text is None:
        return []
    return [Passage(CONFIG, run.config_text)]


def versions(run: Run) -> list[Block]:
    """What the run was begun with, the last time first."""
    found: list[Block] = []
    for number, start in reversed(list(enumerate(run.starts, 1))):
        packages = start.get("versions")
        rows = [
            (str(name), " ".join(map(str, v)) if isinstance(v, list) else _as_text(v))
            for name, v in start.items()
            if name != "versions" and v is not None
        ]
        if isinstance(packages, dict):
            rows += [(str(name), _as_text(version)) for name, version in packages.items()]
        title = "The run was begun" if len(run.starts) == 1 else f"Begun, time {number}"
        found.append(Table(("", ""), rows, title=title))
    return found
