"""Samples of a measurement, taken in turns with another process where two trees are compared.

A suite measures by `samples`. Alone it takes them one after the other. Under `benchmarks.against`
two processes run the same suite over the packages of two trees: each measurement waits until both
have prepared it, and then the two take single samples by turns, one waiting while the other runs.
So what else the machine does, and how warm it is, meets both alike.

    python -m benchmarks.turns MODULE     one of the two; orders come by its standard input
"""

import importlib
import json
import os
import statistics
import sys
from collections.abc import Callable
from dataclasses import asdict
from typing import IO, Any

OF_TURN = 5  # samples of a GPU, whose median is one turn


class Skipped(Exception):
    """The other tree has no such row: the section ends here too."""


class Turns:
    """The side of a process that is told when to take a sample; one line of JSON a message."""

    def __init__(self, orders: IO[str], answers: IO[str]):
        self._orders, self._answers = orders, answers

    def say(self, what: str, value: Any = None) -> None:
        self._answers.write(json.dumps({"what": what, "value": value}) + "\n")
        self._answers.flush()

    def wait(self) -> str:
        """The next order; an end of the input ends this process."""
        order = self._orders.readline().strip()
        if not order:
            sys.exit("the process that gives the turns has ended")
        return order

    def samples(self, once: Callable[[], float], of_turn: int) -> list[float]:
        """The sample of each turn: the median of so many.

        Raises:
            Skipped: the other tree has failed in this section.
        """
        taken: list[float] = []
        self.say("prepared")
        while (order := self.wait()) == "turn":
            taken.append(statistics.median(once() for _ in range(of_turn)))
            self.say("sample", taken[-1])
        if order == "skip":
            raise Skipped
        return taken


_turns: Turns | None = None


def samples(once: Callable[[], float], repeats: int, of_turn: int = OF_TURN) -> list[float]:
    """So many samples of `once`, each a time; or one of each turn, of `of_turn` samples."""
    if _turns is None:
        return [once() for _ in range(repeats)]
    return _turns.samples(once, of_turn)


def compares_peers() -> bool:
    """False where two trees are compared: a peer would be the same for both."""
    return _turns is None


def main(suite: str) -> None:
    """Run the sections of a module; one that fails is reported, and the next one goes on."""
    global _turns
    import torch

    import nemotron_v3

    answers = os.fdopen(os.dup(sys.stdout.fileno()), "w", encoding="utf-8")
    os.dup2(sys.stderr.fileno(), sys.stdout.fileno())  # what a library prints is no message
    turns = _turns = Turns(sys.stdin, answers)
    turns.say("package", nemotron_v3.__file__)
    for name, rows in importlib.import_module(suite).sections().items():
        turns.say("section", name)
        turns.wait()
        torch.manual_seed(0)  # the same numbers, and so the same routing, in both trees
        try:
            for row in rows():
                turns.say("row", asdict(row))
        except Skipped:
            pass
        except Exception as error:  # whatever a tree of another day raises
            turns.say("failed", f"{type(error).__name__}: {error}".splitlines()[0])
    turns.say("end")


if __name__ == "__main__":
    from benchmarks import turns

    turns.main(sys.argv[1])  # of the module that suites import, which is not __main__
