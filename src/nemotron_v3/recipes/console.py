"""What a run shows on a terminal: a line a fact, a bar while it trains, a table at the end."""

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import torch
from rich.console import Console
from rich.padding import Padding
from rich.progress import BarColumn, Progress, TextColumn
from rich.syntax import Syntax
from rich.table import Table
from rich.text import Text

from nemotron_v3.recipes.pretrain import Step

GREEN = "rgb(118,185,0)"
LABEL = 12  # columns that a line's label takes


class Story:
    """Tells a run; holds the one console."""

    def __init__(self, console: Console | None = None):
        self.console = console or Console(highlight=False)

    def title(self, text: str) -> None:
        self.console.print(f"\n[bold {GREEN}]{text}[/]\n")

    def fact(self, label: str, text: str) -> None:
        line = Table.grid()
        line.add_column(width=LABEL, style="dim")
        line.add_column()
        line.add_row(label, text)
        self.console.print(Padding(line, (0, 0, 0, 2)))

    @contextmanager
    def training(self) -> Iterator["TrainingBar"]:
        """A bar with the loss, tokens a second and the time left."""
        progress = Progress(
            TextColumn(f"  [dim]{'training':<{LABEL - 1}}[/]"),
            BarColumn(bar_width=28, complete_style=GREEN, finished_style=GREEN),
            TextColumn("{task.fields[told]}"),
            console=self.console,
        )
        with progress:
            yield TrainingBar(progress)

    def comparison(self, bits_per_byte: dict[str, float]) -> None:
        """Bits per byte by name, each with a bar; the first row is ours."""
        table = Table(box=None, show_header=False, padding=(0, 2, 0, 0))
        most = max(bits_per_byte.values())
        for row, (name, bits) in enumerate(bits_per_byte.items()):
            style = f"bold {GREEN}" if row == 0 else ""
            bar = "━" * round(28 * bits / most)
            name = f"{name:<{LABEL - 2}}"
            table.add_row(name, Text(bar, style or "dim"), f"{bits:.3f}", style=style)
        self.console.print("\n  held out, bits per byte [dim](less is better)[/]\n")
        self.console.print(Padding(table, (0, 0, 0, 2)))

    def code(self, prompt: str, continuation: str) -> None:
        self.console.print(f"\n  what it writes after [dim]{prompt.strip()!r}[/]\n")
        source = Syntax(prompt + continuation, "python", theme="ansi_dark", word_wrap=True)
        self.console.print(Padding(source, (0, 0, 1, 4)))

    def done(self, folder: Path, seconds: float) -> None:
        names = ", ".join(sorted(path.name for path in folder.iterdir()))
        self.fact("saved", f"[bold]{folder}[/]: {names}")
        self.fact("time", f"{clock(seconds)}, {torch.get_num_threads()} threads\n")


class TrainingBar:
    def __init__(self, progress: Progress):
        self._progress = progress
        self._task = progress.add_task("", total=1.0, told="")
        self._loss: float | None = None

    def show(self, step: Step, done: float) -> None:
        """`done`: the fraction of the training behind us."""
        self._loss = step.loss if self._loss is None else 0.9 * self._loss + 0.1 * step.loss
        left = step.seconds * (1 - done) / done if done > 0 else 0.0
        told = (
            f"loss [bold]{self._loss:.3f}[/]  {step.tokens_per_second:,.0f} tokens/s  "
            f"step {step.step}  {clock(left)} left"
        )
        self._progress.update(self._task, completed=min(done, 1.0), told=told)


def clock(seconds: float) -> str:
    """`75.3` -> `1:15`."""
    minutes, rest = divmod(max(round(seconds), 0), 60)
    return f"{minutes}:{rest:02d}"
