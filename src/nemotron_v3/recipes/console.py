"""What the demo shows on a terminal: a line a fact, a table at the end."""

from pathlib import Path

import torch
from rich.console import Console
from rich.padding import Padding
from rich.syntax import Syntax
from rich.table import Table
from rich.text import Text

from nemotron_v3.train.display import GREEN, clock

LABEL = 12  # columns that a line's label takes


class Story:
    """Tells a run; holds the one console."""

    def __init__(self, console: Console | None = None):
        self.console: Console = console or Console(highlight=False)

    def title(self, text: str) -> None:
        self.console.print(f"\n[bold {GREEN}]{text}[/]\n")

    def fact(self, label: str, text: str) -> None:
        line = Table.grid()
        line.add_column(width=LABEL, style="dim")
        line.add_column(overflow="fold")  # a path is shown whole
        line.add_row(label, text)
        self.console.print(Padding(line, (0, 0, 0, 2)))

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

    def done(self, folder: Path, seconds: float, page: Path | None) -> None:
        names = ", ".join(sorted(path.name for path in folder.iterdir()))
        self.fact("saved", f"[bold]{folder}[/]: {names}")
        end = "" if page else "\n"
        self.fact("time", f"{clock(seconds)}, {torch.get_num_threads()} threads{end}")
        if page:
            self.fact("page", f"[bold]{page}[/]: the run's curves, to open in a browser\n")
