"""Whether a run has finished, goes on, was stopped or was killed."""

import os
import socket
import time
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Literal

from nemotron_v3.pages.read import METRICS, Run

Word = Literal["finished", "running", "stopped", "killed", "unknown"]
# A run that has written nothing for so long, and for so many of its steps, is not going on.
QUIET_SECONDS, QUIET_STEPS = 120.0, 20.0


@dataclass(frozen=True)
class State:
    """A word, and a sentence that says what is known."""

    word: Word
    told: str


def state_of(run: Run, now: float | None = None) -> State:
    """What the folder says of its end, and where it says nothing what its process and the age of
    its last line say.

    Args:
        run: as it was read.
        now: seconds since the epoch; None asks the clock.
    """
    step = run.metrics.last_step()
    planned = planned_steps(run.config)
    after = f"step {step:,}" + (f" of {planned:,}" if planned else "")
    start = run.starts[-1] if run.starts else {}
    outcome = start.get("outcome")
    if outcome == "finished":
        return State("finished", f"Finished after {after}.")
    if isinstance(outcome, str):
        return State("stopped", f"Stopped after {after}: {outcome}.")
    if not run.metrics.columns:
        return State("unknown", "Nothing was measured yet.")
    now = time.time() if now is None else now
    try:
        quiet = max(now - (run.folder / METRICS).stat().st_mtime, 0.0)
    except OSError:
        quiet = 0.0
    return _without_an_end(run, start, after, quiet)


def _without_an_end(run: Run, start: Mapping[str, Any], after: str, quiet: float) -> State:
    """Of a run that has written no end."""
    ago = f"its last line is {length_in_words(quiet)} old"
    alive = _alive(start)
    if alive is False:
        return State(
            "killed", f"Killed after {after}: its process has ended without a word; {ago}."
        )
    seconds = run.metrics.column("seconds").values
    usual = sorted(seconds)[len(seconds) // 2] if seconds else 0.0
    if quiet <= max(QUIET_SECONDS, QUIET_STEPS * usual):
        return State("running", f"Still running, after {after}; {ago}.")
    if alive:
        return State("running", f"Silent after {after}: its process is there, but {ago}.")
    return State("killed", f"Killed, or out of reach, after {after}: {ago}, and it told no end.")


def _alive(start: Mapping[str, Any]) -> bool | None:
    """Whether the process that trains is there; None where that cannot be known from here."""
    pid = start.get("pid")
    if os.name != "posix" or not isinstance(pid, int) or pid < 1:
        return None
    if start.get("host") != socket.gethostname():
        return None
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return False
    except (OSError, OverflowError):
        return None
    return True


def planned_steps(config: Mapping[str, Any]) -> int | None:
    """How long the run was to be, where its configuration counts that in steps or tokens."""
    steps, tokens = config.get("schedule.steps"), config.get("schedule.tokens")
    row, rows = config.get("data.tokens_per_row"), config.get("data.rows")
    if isinstance(steps, int) and steps > 0:
        return steps
    if all(isinstance(n, int) and n > 0 for n in (tokens, row, rows)):
        return -(-tokens // (row * rows))  # pyright: ignore
    return None


def length_in_words(seconds: float) -> str:
    """`75` -> `75 s`; `7200` -> `2.0 h`."""
    for limit, unit, size in ((120, "s", 1), (7200, "min", 60), (172800, "h", 3600)):
        if seconds < limit:
            told = seconds / size
            return f"{told:.0f} {unit}" if unit != "h" else f"{told:.1f} h"
    return f"{seconds / 86400:.1f} days"
