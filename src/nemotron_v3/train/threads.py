"""How many threads of a CPU a run by the clock takes: by what its steps measure.

Where other programs share the cores, threads that wait for each other may be slower than one alone,
and nothing tells beforehand. Another number of threads may round sums otherwise: a run whose length
is told in steps keeps the number that it began with, so that it can be gone on with to the bit.
"""

import os
import time
from collections import deque
from collections.abc import Callable

import torch

STEPS = 3  # of a trial, whose first step counts for nothing
PAUSE = 45.0  # seconds between trials, at least
HOPELESS = 0.5  # of the rate before: a trial ends at one step as slow
GAIN = 1.05  # how much faster the other number has to be


class ThreadChoice:
    """All threads or one, whichever takes more tokens a second now.

    Args:
        threads: all of them.
        use: what sets a number of threads.
        clock: of the pauses.

    Attributes:
        current: the number in use.
    """

    def __init__(
        self,
        threads: int,
        use: Callable[[int], None] = torch.set_num_threads,
        clock: Callable[[], float] = time.monotonic,
    ):
        self.current = threads
        self._all, self._use, self._clock = threads, use, clock
        self._last: deque[tuple[int, float]] = deque(maxlen=STEPS)
        self._skipped = 2  # steps that warm up
        self._before: tuple[int, float] | None = None  # of a trial: the number before, its rate
        self._next, self._pause = clock(), PAUSE / 2

    def note(self, tokens: int, seconds: float) -> None:
        """A step of so many tokens has taken so long; the next one may have another number."""
        if self._before is not None and tokens / seconds < HOPELESS * self._before[1]:
            self._end_trial(tokens / seconds)  # at its first step, if need be
            return
        if self._skipped:
            self._skipped -= 1
            return
        self._last.append((tokens, seconds))
        if len(self._last) < STEPS or (self._before is None and self._clock() < self._next):
            return
        rate = sum(n for n, _ in self._last) / sum(t for _, t in self._last)
        if self._before is not None:
            self._end_trial(rate)
            return
        self._before = self.current, rate
        self._change(1 if self.current == self._all else self._all)

    def _end_trial(self, rate: float) -> None:
        assert self._before is not None
        number, earlier = self._before
        self._before = None
        # What was slower is tried again after twice as long.
        self._pause = PAUSE if rate >= GAIN * earlier else 2 * self._pause
        self._next = self._clock() + self._pause
        if rate < GAIN * earlier:
            self._change(number)

    def _change(self, number: int) -> None:
        self.current, self._skipped = number, 1
        self._last.clear()
        self._use(number)


def thread_choice(by_the_clock: bool, device: torch.device) -> ThreadChoice | None:
    """None where the number is settled: by the environment, or since the run is to be repeated."""
    threads = torch.get_num_threads()
    told = "OMP_NUM_THREADS" in os.environ
    if not by_the_clock or told or device.type != "cpu" or threads == 1:
        return None
    return ThreadChoice(threads)
