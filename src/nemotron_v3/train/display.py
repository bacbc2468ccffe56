"""What a run shows on a terminal: what is trained, a bar with the loss, what was saved."""

import time
from collections.abc import Iterator
from contextlib import contextmanager

from rich.console import Console
from rich.progress import BarColumn, Progress, TaskID, TextColumn

from nemotron_v3.train.loop import Step

GREEN = "rgb(118,185,0)"
SMOOTHING = 0.9


class Display:
    """Speaks for the first process; the others are silent.

    Args:
        console: to speak on; None is stderr.
        facts: tell also what is trained and where it is saved, not the loss alone.
    """

    def __init__(self, console: Console | None = None, *, facts: bool = True):
        self.console: Console = console or Console(stderr=True, highlight=False)
        self.facts: bool = facts
        self.speaks: bool = True
        self._loss: float | None = None
        self._speed: float | None = None
        self._bar: tuple[Progress, TaskID] | None = None
        self._told = time.monotonic()
        self._untold: str | None = None  # the last step, where no line has told it

    def say(self, text: str) -> None:
        """A fact, on a line."""
        if self.facts:
            self._print(text)

    def _print(self, text: str) -> None:
        if self.speaks:
            self.console.print(text, markup=False)

    @contextmanager
    def training(self) -> Iterator[None]:
        """Within it, `step` moves a bar, or without a terminal tells a line now and then."""
        if not (self.speaks and self.console.is_terminal):
            try:
                yield
            finally:
                if self._untold is not None:
                    self._print(self._untold)
            return
        columns = (
            BarColumn(bar_width=24, complete_style=GREEN, finished_style=GREEN),
            TextColumn("{task.fields[told]}"),
        )
        with Progress(*columns, console=self.console) as progress:
            self._bar = progress, progress.add_task("", total=1.0, told="")
            try:
                yield
            finally:
                self._bar = None

    def step(self, step: Step, done: float, seconds: float, mfu: float | None) -> None:
        """After a step; `done` is the part of the training behind us, `seconds` what it took."""
        speed = step.tokens / step.seconds
        self._loss = _smooth(self._loss, step.loss)
        self._speed = _smooth(self._speed, speed)
        left = seconds * (1 - done) / done if done > 0 else 0.0
        told = f"step {step.step:,}  loss {self._loss:.4f}  {self._speed:,.0f} tokens/s  "
        told += "" if mfu is None else f"MFU {mfu:.1%}  "
        told += f"{clock(left)} left"
        if self._bar is not None:
            progress, task = self._bar
            progress.update(task, completed=min(done, 1.0), told=told)
        elif step.step == 1 or time.monotonic() - self._told > 10:
            self._told, self._untold = time.monotonic(), None
            self._print(told)
        else:
            self._untold = told


def _smooth(before: float | None, value: float) -> float:
    return value if before is None else SMOOTHING * before + (1 - SMOOTHING) * value


def clock(seconds: float) -> str:
    """`75.3` -> `1:15`; `3675` -> `1:01:15`."""
    minutes, rest = divmod(max(round(seconds), 0), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours}:{minutes:02d}:{rest:02d}" if hours else f"{minutes}:{rest:02d}"
