"""Threads by what steps measure: a stand-in for a machine whose cores come and go."""

import pytest
import torch

from nemotron_v3.train.options import ScheduleOptions
from nemotron_v3.train.run import train
from nemotron_v3.train.threads import PAUSE, ThreadChoice, thread_choice
from tests.train.test_run import SILENT


class Machine:
    """Steps of 1000 tokens; `speed` tells tokens a second by the number of threads."""

    def __init__(self, speed):
        self.now, self.speed, self.used = 0.0, speed, []
        self.choice = ThreadChoice(2, self.used.append, lambda: self.now)

    def run(self, seconds: float) -> float:
        """Tokens a second over so long."""
        start, tokens = self.now, 0
        while self.now < start + seconds:
            took = 1000 / self.speed[self.choice.current]
            self.now, tokens = self.now + took, tokens + 1000
            self.choice.note(1000, took)
        return tokens / (self.now - start)


@pytest.mark.parametrize(
    "speed", [{2: 3500, 1: 2000}, {2: 700, 1: 1900}, {2: 1900, 1: 1900}, {2: 100, 1: 1900}]
)
def test_the_faster_number_runs_but_for_short_trials(speed):
    machine = Machine(speed)
    machine.run(60)
    assert machine.run(300) >= 0.9 * max(speed.values())


def test_it_follows_the_machine():
    machine = Machine({2: 3500, 1: 2000})
    machine.run(20)
    assert machine.choice.current == 2
    machine.speed = {2: 800, 1: 1900}
    machine.run(2 * PAUSE)
    assert machine.choice.current == 1
    machine.speed = {2: 3500, 1: 2000}
    machine.run(2 * PAUSE)
    assert machine.choice.current == 2


def test_equal_speeds_keep_all_threads():
    machine = Machine({2: 1900, 1: 1950})
    machine.run(60)
    assert machine.choice.current == 2


def test_a_number_that_is_told_or_that_results_depend_on_stays(monkeypatch):
    cpu = torch.device("cpu")
    monkeypatch.setattr(torch, "get_num_threads", lambda: 2)
    monkeypatch.delenv("OMP_NUM_THREADS", raising=False)
    assert thread_choice(True, cpu) is not None
    assert thread_choice(False, cpu) is None
    assert thread_choice(True, torch.device("cuda")) is None
    monkeypatch.setenv("OMP_NUM_THREADS", "2")
    assert thread_choice(True, cpu) is None


def test_a_run_by_the_clock_tells_it_of_its_steps_and_leaves_the_threads_as_they_were(
    options, monkeypatch
):
    told, used = [], []
    monkeypatch.delenv("OMP_NUM_THREADS", raising=False)
    monkeypatch.setattr(torch, "get_num_threads", lambda: 2)
    monkeypatch.setattr(torch, "set_num_threads", used.append)
    monkeypatch.setattr(ThreadChoice, "note", lambda self, *step: told.append(step))
    progress = train(options(schedule=ScheduleOptions(minutes=0.01)), **SILENT)
    assert len(told) == progress.step and all(n > 0 and t > 0 for n, t in told)
    assert used[-1] == 2
