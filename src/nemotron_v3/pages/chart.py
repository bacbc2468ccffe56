"""What a page draws: lines, heat maps and bars as plain data, which page.js hands to plotly."""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal

from nemotron_v3.pages.thin import MOST_POINTS, thin

Look = Literal["line", "faint", "points"]
# Digits that a page keeps of a number: more than fp32 has.
DIGITS = 8
STEP = "step"


@dataclass(frozen=True)
class Line:
    """A curve.

    Attributes:
        name: in the legend.
        steps: rising.
        values: as many; a gap where one is not finite.
        tokens: that were trained on up to each step, or None.
        look: drawn whole, faint (behind a smoothed one), or as points.
        colour: a number of the palette, whose colour and dash it takes; None is the next one.
    """

    name: str
    steps: Sequence[float]
    values: Sequence[float]
    tokens: Sequence[float] | None = None
    look: Look = "line"
    colour: int | None = None

    def data(self, most: int = MOST_POINTS) -> dict[str, Any]:
        """As page.js takes it, with at most about `most` points."""
        kept = thin(self.values, most)
        told: dict[str, Any] = {
            "name": self.name,
            "look": self.look,
            "colour": self.colour,
            "step": [self.steps[i] for i in kept],
            "y": [number(self.values[i]) for i in kept],
        }
        if self.tokens is not None:
            told["tokens"] = [number(self.tokens[i]) for i in kept]
        return told


@dataclass(frozen=True)
class Lines:
    """Curves over the steps, in one picture.

    Attributes:
        title: above it.
        unit: of the values, beside the axis.
        lines: at least one.
        log: begin with a logarithmic axis; None where there is no choice.
        form: of a value that is pointed at, as d3 spells it.
        zero: whether a linear axis begins at 0.
        x: what `steps` count. Curves of the same are looked at closer together.
        log_x: whether that axis is logarithmic.
        wide: whether the picture takes the whole width of the page.
        note: below the title.
    """

    title: str
    unit: str
    lines: Sequence[Line]
    log: bool | None = None
    form: str = ".4~g"
    zero: bool = False
    x: str = STEP
    log_x: bool = False
    wide: bool = False
    note: str = ""

    def data(self) -> dict[str, Any]:
        """As page.js takes it."""
        # Many lines share what one may have, so that a page of many runs stays small.
        most = max(MOST_POINTS // max(1, len(self.lines) // 2), 500)
        return {
            "kind": "lines",
            "title": self.title,
            "unit": self.unit,
            "log": self.log,
            "form": self.form,
            "zero": self.zero,
            "x": self.x,
            "log_x": self.log_x,
            "lines": [line.data(most) for line in self.lines],
        }


@dataclass(frozen=True)
class Frame:
    """One of the heat maps that a picture can show: rows by steps."""

    name: str
    rows: Sequence[str]
    steps: Sequence[float]
    values: Sequence[Sequence[float]]
    tokens: Sequence[float] | None = None


@dataclass(frozen=True)
class Heat:
    """Heat maps over the steps, one of which is shown at a time.

    Attributes:
        title: above it.
        unit: of the values, beside the scale.
        frames: at least one.
        rows: what a row is.
        scale: one colour that deepens, or two from a middle value.
        low, high: ends of the scale; None is what the data have.
        note: below the title.
        wide: whether the picture takes the whole width of the page.
    """

    title: str
    unit: str
    frames: Sequence[Frame]
    rows: str
    scale: Literal["sequential", "diverging"] = "sequential"
    low: float | None = None
    high: float | None = None
    note: str = ""
    wide: bool = True

    def data(self) -> dict[str, Any]:
        """As page.js takes it."""
        return {
            "kind": "heat",
            "title": self.title,
            "unit": self.unit,
            "rows": self.rows,
            "scale": self.scale,
            "low": self.low,
            "high": self.high,
            "frames": [
                {
                    "name": frame.name,
                    "rows": list(frame.rows),
                    "step": list(frame.steps),
                    "tokens": None if frame.tokens is None else list(map(number, frame.tokens)),
                    "z": [[number(value, 4) for value in row] for row in frame.values],
                }
                for frame in self.frames
            ],
        }


@dataclass(frozen=True)
class Bars:
    """Bars side by side: a group for each of `names`, a bar in it for each of `values`."""

    title: str
    unit: str
    names: Sequence[str]
    values: Mapping[str, Sequence[float | None]]
    form: str = ".4~g"
    note: str = ""

    @property
    def wide(self) -> bool:
        """Whether the picture takes the whole width of the page."""
        return len(self.names) * len(self.values) > 8

    def data(self) -> dict[str, Any]:
        """As page.js takes it."""
        bars = {
            name: [None if value is None else number(value) for value in values]
            for name, values in self.values.items()
        }
        return {
            "kind": "bars",
            "title": self.title,
            "unit": self.unit,
            "form": self.form,
            "names": list(self.names),
            "bars": [{"name": name, "y": values} for name, values in bars.items()],
        }


Chart = Lines | Heat | Bars


def number(value: float, digits: int = DIGITS) -> float | None:
    """A value with its first digits; None, a gap, where it is not finite."""
    if not math.isfinite(value):
        return None
    short = float(f"{value:.{digits}g}")
    return int(short) if short.is_integer() and abs(short) < 2**53 else short
