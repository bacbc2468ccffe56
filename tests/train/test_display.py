"""What a run shows."""

from dataclasses import replace
from io import StringIO

import pytest
from rich.console import Console

from nemotron_v3.train.display import Display, clock
from nemotron_v3.train.loop import Step

STEP = Step(1, 100, 100, 96, 50.0, 0.5, 3.25, 1e-3, 1.0, {})


@pytest.mark.parametrize(
    ("seconds", "told"),
    [(0.4, "0:00"), (59.6, "1:00"), (75.3, "1:15"), (-3, "0:00"), (3675, "1:01:15")],
)
def test_a_clock_is_hours_minutes_and_seconds(seconds, told):
    assert clock(seconds) == told


@pytest.mark.parametrize("terminal", [True, False])
def test_a_step_tells_loss_speed_mfu_and_the_time_left(terminal):
    file = StringIO()
    display = Display(Console(file=file, force_terminal=terminal, width=120))
    with display.training():
        display.step(STEP, done=0.25, seconds=30.0, mfu=0.412)
    told = file.getvalue()
    assert all(part in told for part in ("loss 3.2500", "200 tokens/s", "MFU 41.2%", "1:30 left"))


def test_without_a_terminal_the_first_and_the_last_step_have_a_line():
    file = StringIO()
    display = Display(Console(file=file, width=120))
    with display.training():
        for number in range(1, 6):
            display.step(replace(STEP, step=number), number / 5, 1.0, None)
    assert [line.split("  ")[0] for line in file.getvalue().splitlines()] == ["step 1", "step 5"]


def test_who_is_not_the_first_process_is_silent():
    file = StringIO()
    display = Display(Console(file=file))
    display.speaks = False
    with display.training():
        display.step(STEP, 0.5, 1.0, None)
        display.say("a fact")
    assert file.getvalue() == ""
