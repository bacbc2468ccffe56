"""The page of a run in training: as often as it is cheap, and never in the training's way."""

import pytest

from nemotron_v3.pages import live
from nemotron_v3.pages.live import LiveReport
from tests.pages.runs import line_of, write_run


class Clock:
    """Time that goes on when it is told to, and when a page is written."""

    def __init__(self):
        self.now = 0.0

    def __call__(self) -> float:
        return self.now


@pytest.fixture
def written(monkeypatch):
    """When pages were written; each takes 5 seconds."""
    clock, times = Clock(), []

    def write(page, path):
        times.append(clock.now)
        clock.now += 5

    monkeypatch.setattr(live, "write_page", write)
    times_and_clock = times, clock
    return times_and_clock


def test_it_is_written_early_and_then_as_often_as_it_is_cheap(tmp_path, written):
    times, clock = written
    report = LiveReport(write_run(tmp_path / "run", [line_of(1)]), 1.0, print, clock)
    for _ in range(2000):
        clock.now += 1
        report.step()
    # At 30 seconds, and then at every 500, of which 5 are a hundredth.
    assert times == [30, 535, 1040, 1545]
    assert report.end() == tmp_path / "run" / "report.html" and len(times) == 5


def test_zero_minutes_write_none(tmp_path, written):
    times, clock = written
    report = LiveReport(write_run(tmp_path / "run", [line_of(1)]), 0.0, print, clock)
    clock.now = 1e6
    report.step()
    assert report.end() is None and times == []


def test_no_error_of_writing_reaches_the_training(tmp_path, monkeypatch):
    def fail(page, path):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(live, "write_page", fail)
    clock, told = Clock(), []
    report = LiveReport(write_run(tmp_path / "run", [line_of(1)]), 1.0, told.append, clock)
    for _ in range(3):
        clock.now += 100
        report.step()
    assert report.end() is None
    assert told == ["report.html could not be written: OSError: [Errno 28] No space left on device"]


def test_a_page_that_stands_there_goes_on_saying_that_the_run_went_on(tmp_path):
    clock = Clock()
    folder = write_run(tmp_path / "run", [line_of(1)])
    report = LiveReport(folder, 1.0, print, clock)
    clock.now = 40.0
    report.step()
    text = (folder / "report.html").read_text()
    assert "Running when this page was written" in text and 'data-refreshed="60' in text
    report.end()
    text = (folder / "report.html").read_text()
    assert "Running when" not in text
