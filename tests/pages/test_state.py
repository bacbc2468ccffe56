"""How a run ended, or whether it goes on."""

import os
import socket
import subprocess
import sys

import pytest

from nemotron_v3.pages.read import read_run
from nemotron_v3.pages.state import length_in_words, planned_steps, state_of
from tests.pages.runs import line_of, make_old, write_run

HOST = socket.gethostname()


def state(tmp_path, quiet=0.0, lines=12, **start):
    folder = write_run(tmp_path / "run", [line_of(step) for step in range(1, lines + 1)], **start)
    make_old(folder, quiet)
    return state_of(read_run(folder))


def ended_process() -> int:
    """The number of a process that is no more."""
    process = subprocess.Popen([sys.executable, "-c", ""])
    process.wait()
    return process.pid


def test_what_the_run_says_of_its_end_counts(tmp_path):
    found = state(tmp_path / "a", quiet=1e6, outcome="finished")
    assert (found.word, found.told) == ("finished", "Finished after step 12 of 100.")
    found = state(tmp_path / "b", outcome="NotFinite: step 13: the loss is nan")
    assert found.word == "stopped" and "step 13: the loss is nan" in found.told


def test_a_process_that_is_there_goes_on_and_one_that_is_not_was_killed(tmp_path):
    there = {"host": HOST, "pid": os.getpid()}
    assert state(tmp_path / "a", quiet=5, **there).word == "running"
    silent = state(tmp_path / "b", quiet=9000, **there)
    assert silent.word == "running" and silent.told.startswith("Silent after step 12 of 100")
    gone = state(tmp_path / "c", quiet=5, host=HOST, pid=ended_process())
    assert gone.word == "killed" and "step 12 of 100" in gone.told


@pytest.mark.parametrize("start", [{}, {"host": "elsewhere", "pid": 1}, {"host": HOST, "pid": -1}])
def test_without_its_process_the_age_of_the_last_line_decides(tmp_path, start):
    assert state(tmp_path / "a", quiet=60, **start).word == "running"
    old = state(tmp_path / "b", quiet=3600, **start)
    assert old.word == "killed" and "60 min old" in old.told


def test_nothing_measured_is_no_state(tmp_path):
    assert state(tmp_path, lines=0).word == "unknown"


def test_the_length_is_counted_in_steps_where_it_can_be():
    config = {"data.tokens_per_row": 10, "data.rows": 4}
    assert planned_steps(config | {"schedule.tokens": 401}) == 11
    assert planned_steps(config | {"schedule.steps": 7}) == 7
    assert planned_steps(config | {"schedule.minutes": 3.0}) is None
    assert [length_in_words(s) for s in (5, 300, 9000, 2e6)] == [
        "5 s",
        "5 min",
        "2.5 h",
        "23.1 days",
    ]
