"""The rows of a suite over this tree's package and over another's, measured by turns.

    python -m benchmarks.against TREE SUITE ...       TREE is another checkout, or its sources

The suites are this checkout's; only the package differs. Each tree has a process of its own, and
the two take their samples by turns (`benchmarks.turns`), so that no row is measured at another time
or temperature than its neighbour. A row is slower if its median is more than 3 % longer and longer
by more than either tree's samples lie apart; the exit status is then 1.
"""

import argparse
import json
import os
import statistics
import subprocess
import sys
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from benchmarks.measure import ROOT
from benchmarks.table import aligned, shown

SUITES = ("cpu", "mamba2_gpu", "moe_gpu")
TURNS = 7
MOST = 1.03
TOP = ("section", "end")


class Tree:
    """A process that runs a suite over the package of one tree, and its newest message."""

    def __init__(self, folder: Path, module: str):
        path = f"{folder / 'src'}{os.pathsep}{ROOT}"
        self._process = subprocess.Popen(
            [sys.executable, "-m", "benchmarks.turns", module],
            cwd=ROOT,
            env=os.environ | {"PYTHONPATH": path},
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
        )
        self.what, self.value = "", None
        self.hear()
        if self.what == "package" and not Path(self.value).is_relative_to(folder / "src"):
            raise SystemExit(f"{folder} was to be measured, and {self.value} was imported")

    def hear(self) -> Any:
        """The next message's value; the end where the process has died."""
        line = self._process.stdout.readline()
        message = json.loads(line) if line else {"what": "end", "value": None}
        self.what, self.value = message["what"], message["value"]
        return self.value

    def order(self, word: str) -> None:
        self._process.stdin.write(f"{word}\n")
        self._process.stdin.flush()

    def end_section(self) -> None:
        """Leave what is left of a section unmeasured."""
        while self.what not in TOP:
            if self.what == "prepared":
                self.order("skip")
            self.hear()

    def close(self, patience: float = 30) -> int:
        """End the process, which ends by itself where its orders end; its exit status."""
        self._process.stdin.close()
        try:
            return self._process.wait(patience)
        except subprocess.TimeoutExpired:  # it compiles or computes, and asks for no order
            self._process.kill()
            return self._process.wait()


@dataclass(frozen=True)
class Pair:
    """A row of both trees, with the samples of its measurement: times, `[]` of what is no time."""

    before: dict[str, Any]
    after: dict[str, Any]
    samples: tuple[list[float], list[float]]

    @property
    def change(self) -> float | None:
        """The new time as a part of the old one; of what is no time the value's."""
        if all(self.samples):
            before, after = map(statistics.median, self.samples)
        else:
            before, after = self.before["ours"], self.after["ours"]
        if isinstance(before, str) or isinstance(after, str):
            return None
        return after / before

    @property
    def spread(self) -> float | None:
        """How far apart the samples of a tree lie, its extremes left out, as a part of the old
        time: the larger of the two trees'."""
        if not all(self.samples):
            return None
        widths = [ordered[-2] - ordered[1] for ordered in map(sorted, self.samples)]
        return max(widths) / statistics.median(self.samples[0])

    @property
    def slower(self) -> bool:
        if self.change is None or self.spread is None:
            return False
        return self.change > max(MOST, 1 + self.spread)


@dataclass(frozen=True)
class Missing:
    """The rest of a section, which one of the trees cannot run."""

    section: str
    why: str


def compare(before: Tree, after: Tree, turns: int) -> Iterator[Pair | Missing]:
    """The rows of one suite; both trees stand at their package's message."""
    both = (before, after)
    section, samples = "", ([], [])
    for tree in both:
        tree.hear()
    while {before.what, after.what} != {"end"}:
        kinds = {before.what, after.what}
        if kinds == {"prepared"}:
            samples = _take_turns(before, after, turns)
        elif kinds == {"row"}:
            yield Pair(before.value, after.value, samples)
            samples = ([], [])
        elif kinds == {"section"}:
            section = before.value
            for tree in both:
                tree.order("go")
        else:
            yield Missing(section, _why(before, after))
            if "end" in kinds:
                return
            for tree in both:
                tree.end_section()
            continue
        for tree in both:
            tree.hear()


def _why(before: Tree, after: Tree) -> str:
    for name, tree in (("the other tree", before), ("this tree", after)):
        if tree.what == "failed":
            return f"{name}: {tree.value}"
        if tree.what == "end":
            return f"{name}: its process has ended"
    return f"the trees differ: {before.what} and {after.what}"


def _take_turns(before: Tree, after: Tree, turns: int) -> tuple[list[float], list[float]]:
    taken: tuple[list[float], list[float]] = ([], [])
    for turn in range(turns):
        order = ((before, taken[0]), (after, taken[1]))
        for tree, its in order if turn % 2 == 0 else reversed(order):
            tree.order("turn")
            its.append(tree.hear())
    for tree in (before, after):
        tree.order("next")
    return taken


def render(found: Sequence[Pair | Missing]) -> str:
    lines = [["work", "shape", "unit", "other tree", "this tree", "change", "spread", ""]]
    for pair in found:
        if isinstance(pair, Missing):
            continue
        change, spread = pair.change, pair.spread
        lines.append([
            *(pair.before[name] for name in ("work", "shape", "unit")),
            *(shown(row["ours"]) for row in (pair.before, pair.after)),
            "" if change is None else f"{change - 1:+.1%}",
            "" if spread is None else f"{spread:.1%}",
            "SLOWER" if pair.slower else "",
        ])  # fmt: skip
    missing = [f"{m.section}, the rest: {m.why}" for m in found if isinstance(m, Missing)]
    return "\n".join([*aligned(lines, text_columns=3), *missing])


def main(arguments: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("tree", type=Path, help="another checkout, or a folder with its src/")
    parser.add_argument("suites", nargs="+", choices=SUITES, metavar="SUITE")
    parser.add_argument("--turns", type=int, default=TURNS, help="samples of each row and tree")
    options = parser.parse_args(arguments)
    tree = options.tree.resolve()
    if not (tree / "src" / "nemotron_v3").is_dir():
        parser.error(f"{tree} holds no src/nemotron_v3")
    if options.turns < 3:
        parser.error(f"--turns {options.turns}: a spread takes 3 at least")
    slower = False
    for suite in options.suites:
        before, after = (Tree(each, f"benchmarks.{suite}") for each in (tree, ROOT))
        found: list[Pair | Missing] = []
        try:
            for each in compare(before, after, options.turns):
                found.append(each)
                print(render(found[-1:]).splitlines()[-1], file=sys.stderr, flush=True)
        finally:  # a table of what was measured before an interruption too
            print(f"{suite}: this tree beside {tree}, {options.turns} turns")
            print(render(found), flush=True)
            for process in (before, after):
                process.close()
        slower |= any(isinstance(each, Pair) and each.slower for each in found)
    return int(slower)


if __name__ == "__main__":
    sys.exit(main())
