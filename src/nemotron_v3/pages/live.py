"""The page of a run in training: written now and then and at its end, and never in its way."""

import time
from collections.abc import Callable
from pathlib import Path

from nemotron_v3.pages.page import write_page
from nemotron_v3.pages.read import read_run
from nemotron_v3.pages.run import run_page
from nemotron_v3.pages.state import State

REPORT = "report.html"
# Writing takes at most this part of the run's time, however long its metrics get.
MOST_OF_TIME = 0.01
# The first page comes early, since somebody may be waiting for it.
FIRST_SECONDS = 30.0


class LiveReport:
    """Writes `report.html` into a run's folder.

    No error of writing reaches the training: it is told once, and the next writing tries again.

    Args:
        folder: of the run.
        minutes: between writings; 0 writes none.
        say: takes a sentence for the user.
        clock: seconds, for tests.
    """

    def __init__(
        self,
        folder: Path,
        minutes: float,
        say: Callable[[str], None],
        clock: Callable[[], float] = time.monotonic,
    ):
        self._folder, self._say, self._clock = folder, say, clock
        self._between = self._gap = 60 * minutes
        self._next = clock() + min(self._between, FIRST_SECONDS)
        self._told = False

    def step(self) -> None:
        """After a step: write it where the time has come."""
        start = self._clock()
        if not self._between or start < self._next:
            return
        told = "Running when this page was written; the run writes it anew now and then."
        self._write(State("running", told))
        stop = self._clock()
        self._gap = max(self._between, (stop - start) / MOST_OF_TIME)
        self._next = stop + self._gap

    def end(self) -> Path | None:
        """Nothing more will come, and the folder says how it ended; gives the page, None where
        there is none."""
        written = bool(self._between) and self._write(None)
        return self._folder / REPORT if written else None

    def _write(self, state: State | None) -> bool:
        try:
            page = run_page(read_run(self._folder), state, self._gap)
            write_page(page, self._folder / REPORT)
        except Exception as error:  # whatever it is, the training matters more
            if not self._told:
                self._told = True
                self._say(f"{REPORT} could not be written: {type(error).__name__}: {error}")
            return False
        return True
