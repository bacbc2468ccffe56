"""A run's folder as columns of numbers: all that can be read, and a word on what cannot."""

import json
import math
from array import array
from bisect import bisect_left
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from nemotron_v3.config.atomic import final_name

# The files of a run, as training writes them.
METRICS, CONFIG, ABOUT, SAMPLES = "metrics.jsonl", "train.toml", "run.json", "samples.jsonl"
# A line names its numbers itself; one that is longer is no line of a run.
MAX_LINE = 2**24
MAX_BYTES = 2**22
LOADS = "experts/load"


@dataclass
class Column:
    """The values of one name, and the steps that they are of, which rise."""

    steps: array = field(default_factory=lambda: array("q"))
    values: array = field(default_factory=lambda: array("d"))

    def add(self, step: int, value: float) -> bool:
        """Take a value in; whether it took the place of others: the run went back to `step`."""
        again = bool(self.steps) and self.steps[-1] >= step
        if again:
            kept = bisect_left(self.steps, step)
            del self.steps[kept:], self.values[kept:]
        self.steps.append(step)
        self.values.append(value)
        return again

    def not_finite(self) -> list[int]:
        """The steps whose values are NaN or infinite."""
        found = zip(self.steps, self.values, strict=True)
        return [step for step, value in found if not math.isfinite(value)]


@dataclass
class Loads:
    """The load of each expert of one router, in percent of an even one, by step."""

    steps: array = field(default_factory=lambda: array("q"))
    loads: list[array] = field(default_factory=list)

    def add(self, step: int, loads: array) -> None:
        """Take the loads of a step in, in the place of those that were of it or beyond."""
        kept = bisect_left(self.steps, step)
        del self.steps[kept:], self.loads[kept:]
        self.steps.append(step)
        self.loads.append(loads)


@dataclass
class Metrics:
    """metrics.jsonl, by name.

    Attributes:
        columns: numbers by step.
        loads: of experts, by the router's layer.
        whole: what lines without a step told: results of the run as a whole.
        broken: the numbers of lines that are no JSON object, from 1; `unfinished` where the last
            one has no end.
        again: how often the run went back to an earlier step.
    """

    columns: dict[str, Column] = field(default_factory=dict)
    loads: dict[str, Loads] = field(default_factory=dict)
    whole: dict[str, Any] = field(default_factory=dict)
    broken: list[int] = field(default_factory=list)
    unfinished: bool = False
    again: int = 0

    def column(self, name: str) -> Column:
        """The numbers of a name; empty where there are none."""
        return self.columns.get(name, Column())

    def last_step(self) -> int:
        """The greatest step of all columns; 0 without any."""
        return max((column.steps[-1] for column in self.columns.values()), default=0)


@dataclass
class Run:
    """All that a run's folder tells.

    Attributes:
        folder: where it lies.
        name: to show.
        metrics: what was measured.
        config_text: train.toml as it is, or None.
        config: the same by dotted names.
        starts: run.json: an entry for each time it was begun.
        samples: texts that were generated, each a mapping.
        problems: what could not be read, in words.
    """

    folder: Path
    name: str
    metrics: Metrics
    config_text: str | None
    config: dict[str, Any]
    starts: list[dict[str, Any]]
    samples: list[dict[str, Any]]
    problems: list[str]


def read_run(folder: Path) -> Run:
    """Read what is there; what is missing or broken is told in `problems`.

    Raises:
        ValueError: the folder holds no run.
        OSError: a file that is there cannot be read.
    """
    if not (folder / METRICS).is_file() and not (folder / CONFIG).is_file():
        raise ValueError(f"{folder} holds no run: neither {METRICS} nor {CONFIG} is in it")
    problems: list[str] = []
    metrics = read_metrics(folder / METRICS) if (folder / METRICS).is_file() else Metrics()
    if not metrics.columns:
        problems.append(f"{METRICS} has no line of a step yet.")
    problems += _told_of(metrics)
    text = _text(folder / CONFIG, problems)
    config = {} if text is None else _flat(_toml(text, problems))
    starts = _starts(folder / ABOUT, problems)
    samples = _samples(folder / SAMPLES, problems)
    return Run(
        folder, final_name(folder) or str(folder), metrics, text, config, starts, samples, problems
    )


def read_metrics(path: Path) -> Metrics:
    """Read a file line by line, whatever is in it."""
    metrics = Metrics()
    with path.open("rb") as file:
        for number, raw in enumerate(iter(lambda: file.readline(MAX_LINE), b""), 1):
            line = _object(raw)
            if line is None:
                if raw.strip():
                    metrics.broken.append(number)
                    metrics.unfinished = not raw.endswith(b"\n")
                continue
            _take(metrics, line)
    return metrics


def _object(raw: bytes) -> dict[str, Any] | None:
    try:
        line = json.loads(raw, parse_int=_integer)
    except (ValueError, RecursionError):
        return None
    return line if isinstance(line, dict) else None


def _integer(digits: str) -> int | float:
    """A number without a point; beyond 64 bits as a float, which may be infinite."""
    value = int(digits) if len(digits) <= 20 else 2**64
    return value if -(2**63) <= value < 2**63 else float(digits)


def _take(metrics: Metrics, line: Mapping[str, Any]) -> None:
    step = line.get("step")
    if isinstance(step, bool) or not isinstance(step, int):
        metrics.whole |= {name: value for name, value in line.items() if name != "step"}
        return
    again = False
    for name, value in line.items():
        if name == "step":
            continue
        if name == LOADS and isinstance(value, dict):
            _take_loads(metrics, step, value)
        elif isinstance(value, int | float) and not isinstance(value, bool):
            column = metrics.columns.get(name)
            if column is None:
                column = metrics.columns[name] = Column()
            again |= column.add(step, float(value))
    metrics.again += again


def _take_loads(metrics: Metrics, step: int, routers: Mapping[str, Any]) -> None:
    for layer, loads in routers.items():
        try:
            percents = array("d", loads)
        except TypeError:
            continue
        metrics.loads.setdefault(layer, Loads()).add(step, percents)


def _told_of(metrics: Metrics) -> Iterator[str]:
    """What is odd about the lines, in words."""
    broken = metrics.broken
    if metrics.unfinished:
        broken = broken[:-1]
        yield f"The last line of {METRICS} is unfinished: the run was killed or is writing it."
    if broken:
        lines = "Line" if len(broken) == 1 else "Lines"
        verb = "is" if len(broken) == 1 else "are"
        yield f"{lines} {_listed(broken)} of {METRICS} {verb} no JSON object, and left out."
    if metrics.again:
        yield "The run went back to an earlier step; the later lines of a step are shown."
    for name, column in metrics.columns.items():
        if steps := column.not_finite():
            which = "step" if len(steps) == 1 else "steps"
            yield f"{name} is NaN or infinite at {which} {_listed(steps)}."


def _listed(numbers: list[int], most: int = 6) -> str:
    shown = ", ".join(f"{n:,}" for n in numbers[:most])
    return shown if len(numbers) <= most else f"{shown} and {len(numbers) - most:,} more"


def _text(path: Path, problems: list[str]) -> str | None:
    if not path.is_file():
        problems.append(f"{path.name} is missing.")
        return None
    with path.open("rb") as file:
        raw = file.read(MAX_BYTES + 1)
    if len(raw) > MAX_BYTES:
        problems.append(f"{path.name} is larger than {MAX_BYTES:,} bytes, and not shown.")
        return None
    return raw.decode("utf-8", "replace")


def _toml(text: str, problems: list[str]) -> dict[str, Any]:
    import tomllib

    try:
        return tomllib.loads(text)
    except (tomllib.TOMLDecodeError, RecursionError) as error:
        problems.append(f"{CONFIG} is no TOML: {error}.")
        return {}


def _flat(table: Mapping[str, Any], prefix: str = "") -> dict[str, Any]:
    """`{"data": {"rows": 8}}` as `{"data.rows": 8}`."""
    flat: dict[str, Any] = {}
    for name, value in table.items():
        if isinstance(value, dict):
            flat |= _flat(value, f"{prefix}{name}.")
        else:
            flat[prefix + name] = value
    return flat


def _starts(path: Path, problems: list[str]) -> list[dict[str, Any]]:
    text = _text(path, problems)
    if text is None:
        return []
    try:
        starts = json.loads(text)
    except (ValueError, RecursionError):
        starts = None
    if not isinstance(starts, list) or not all(isinstance(start, dict) for start in starts):
        problems.append(f"{path.name} is no list of JSON objects, and left out.")
        return []
    return starts


def _samples(path: Path, problems: list[str]) -> list[dict[str, Any]]:
    if not path.is_file():
        return []
    text = _text(path, problems) or ""
    lines = [_object(line.encode()) for line in text.splitlines() if line.strip()]
    samples = [line for line in lines if line is not None and isinstance(line.get("text"), str)]
    if len(samples) < len(lines):
        problems.append(f"{path.name} has {len(lines) - len(samples)} lines that are no samples.")
    return samples
