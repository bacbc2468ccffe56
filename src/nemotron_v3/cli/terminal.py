"""What is written to a terminal or a pipe: tables that lose no digit, text that is only text."""

import os
import re
import sys
import time
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from rich.console import Console
    from rich.table import Table

# Control characters act on a terminal: they move the cursor, change its title, or make it type.
# Those of ASCII are shown as their pictures, those of Latin-1 as their numbers; a new line and a
# tabulator stay what they are.
_PICTURES = {code: chr(0x2400 + code) for code in range(0x20) if chr(code) not in "\n\t"}
_PICTURES |= {0x7F: "\u2421"} | {code: f"\\x{code:02x}" for code in range(0x80, 0xA0)}


def harmless(text: str) -> str:
    """`text` with control characters and halves of characters made visible, so that it cannot act
    on a terminal."""
    return text.encode("utf-8", "backslashreplace").decode().translate(_PICTURES)


def one_line(text: str) -> str:
    """`text` as one harmless line: line breaks become spaces."""
    return harmless(" ".join(text.split()))


def told_lines(text: str) -> str:
    """`text` as one harmless line, but for the items of a list in it (`  - item`), which stand on
    lines of their own where there are several."""
    first, *items = re.split(r"\n\s*(?:- |(?=\.\.\. and ))", text)
    if len(items) < 2:
        return one_line(" ".join([first, *items]))
    return "\n".join([one_line(first), *(f"  - {one_line(item)}" for item in items)])


def new_table(*headings: str, title: str | None = None) -> "Table":
    """A table that is narrow enough for 60 columns: rules between sections, no frame."""
    from rich import box
    from rich.table import Table

    table = Table(
        title=title,
        title_justify="left",
        box=box.SIMPLE_HEAD,
        show_header=any(headings),
        padding=(0, 1),
        pad_edge=False,
    )
    for heading in headings:
        table.add_column(heading, overflow="fold")
    return table


def new_console(stderr: bool = False) -> "Console":
    """A console that shows text as it is."""
    from rich.console import Console

    class Quiet(Console):
        def on_broken_pipe(self) -> None:
            # rich's own ends the process with 1; the command has a status of its own for it.
            raise BrokenPipeError

    return Quiet(highlight=False, stderr=stderr)


def console_for(*tables: "Table", narrowest: int | None = None) -> "Console":
    """A console for stdout in which the tables have room.

    In a terminal that is narrower than a table can be without a broken word, the terminal breaks
    the lines and nothing is cut off. A pipe has no width, so nothing is broken there.

    Args:
        *tables: what is to be shown.
        narrowest: the width at which words are broken to fit, for tables with long paths in them.
    """
    from rich.measure import Measurement

    console = new_console()
    unlimited = console.options.update(max_width=10_000)
    sizes = [Measurement.get(console, unlimited, table) for table in tables]
    if sys.stdout.isatty() or "COLUMNS" in os.environ:
        least = max(size.minimum for size in sizes)
        console.width = max(console.width, least if narrowest is None else min(least, narrowest))
    else:
        console.width = max(80, *(size.maximum for size in sizes))
    return console


def tell_rate(count: int, started: float, reason: str) -> None:
    """How many tokens came, how fast, and why they ended, on stderr."""
    rate = count / (time.perf_counter() - started)
    summary = f"{count:,} tokens, {rate:.1f} tokens/s, {reason}"
    new_console(stderr=True).print(summary, style="dim")
