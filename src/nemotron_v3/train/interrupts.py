"""Signals that ask a run to end: it finishes its step and saves."""

import signal
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager

SIGNALS = (signal.SIGINT, signal.SIGTERM)


class Stopped(KeyboardInterrupt):
    """A run that was asked to end by the signal `number`, and was saved."""

    def __init__(self, number: int, where: str):
        super().__init__(where)
        self.number = number


@contextmanager
def noted_signals() -> Iterator[Callable[[], int]]:
    """Within it, the first SIGINT or SIGTERM is only noted; a second one acts as before.

    Gives the function that says which was noted, 0 for none.
    """
    noted = 0
    if threading.current_thread() is not threading.main_thread():
        yield lambda: noted  # signals are the main thread's
        return

    def note(number: int, frame: object) -> None:
        nonlocal noted
        noted = number
        for each, handler in before.items():
            signal.signal(each, handler)

    before = {number: signal.signal(number, note) for number in SIGNALS}
    try:
        yield lambda: noted
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
