"""What training leaves for its page: how it ended, the loads of each router; and the page."""

import json
import os
import signal
from dataclasses import replace

import pytest
import torch
from rich.console import Console

from nemotron_v3.pages import live
from nemotron_v3.pages.read import read_run
from nemotron_v3.pages.state import state_of
from nemotron_v3.train.display import Display
from nemotron_v3.train.interrupts import Stopped
from nemotron_v3.train.loop import NotFinite
from nemotron_v3.train.options import LogOptions, OptimizerOptions, ScheduleOptions
from nemotron_v3.train.run import train
from tests.train.conftest import base, options  # noqa: F401
from tests.train.fakes import MadeUp


class NoTokenizer:
    """Of data that are made up."""

    chat_template = None


@pytest.fixture
def run(options, tmp_path):  # noqa: F811
    """Train a few steps; `run.told` is what the user was told."""
    with (tmp_path / "told").open("w") as file:
        console = Console(record=True, width=300, file=file)

        def start(after_step=None, **changes):
            asked = options(**{"schedule": ScheduleOptions(steps=4)} | changes)
            more = {"display": Display(console), "after_step": after_step, "make_data": MadeUp}
            train(asked, tokenizer=NoTokenizer(), **more)
            return asked.out

        start.told = console.export_text
        start.out = tmp_path / "run"
        yield start


def last_start(out) -> dict:
    return json.loads((out / "run.json").read_text())[-1]


def test_a_finished_run_says_so_and_names_its_page(run):
    out = run()
    assert last_start(out)["outcome"] == "finished" and last_start(out)["pid"] == os.getpid()
    assert state_of(read_run(out)).told == "Finished after step 4 of 4."
    assert f"page: {out / 'report.html'}" in run.told()
    text = (out / "report.html").read_text()
    assert "Finished after step 4 of 4." in text and "<h1>run</h1>" in text


def test_a_stopped_run_says_what_stopped_it(run):
    def press(step):
        if step.step == 2:
            os.kill(os.getpid(), signal.SIGTERM)

    with pytest.raises(Stopped):
        run(after_step=press)
    assert last_start(run.out)["outcome"].startswith("Stopped: saved after step 2")
    assert "Stopped after step 2 of 4" in (run.out / "report.html").read_text()


def test_a_run_that_met_nan_says_which_module_made_it(run, monkeypatch):
    rate = OptimizerOptions(learning_rate=1e30, clip_norm=1e30)
    with pytest.raises(NotFinite):
        run(optimizer=rate)
    state = state_of(read_run(run.out))
    assert state.word == "stopped" and "the first that is not finite is" in state.told
    assert "NotFinite" in (run.out / "report.html").read_text()


def test_a_page_that_cannot_be_written_ends_no_run(run, monkeypatch):
    def fail(page, path):
        raise ValueError("a page needs plotly: pip install plotly")

    monkeypatch.setattr(live, "write_page", fail)
    out = run()
    assert last_start(out)["outcome"] == "finished" and not (out / "report.html").exists()
    assert "report.html could not be written: ValueError: a page needs plotly" in run.told()


def test_no_page_is_written_where_none_is_asked_for(run):
    assert not (run(log=LogOptions(report=0.0)) / "report.html").exists()
    assert "page:" not in run.told()


def test_a_negative_time_between_pages_is_refused(options):  # noqa: F811
    asked = options(log=LogOptions(report=-1.0))
    with pytest.raises(ValueError, match=r"log.report is -1.0: give 0 or more"):
        train(asked, tokenizer=NoTokenizer(), make_data=MadeUp)
    assert not asked.out.exists()
    replace(asked, log=LogOptions(report=0.5)).check()


def test_each_router_tells_its_loads_and_all_of_them_the_mean(run):
    out = run(log=LogOptions(details=1))
    lines = [json.loads(line) for line in (out / "metrics.jsonl").read_text().splitlines()]
    assert len(lines) == 4
    for line in lines:
        assert list(line["experts/load"]) == ["1"]  # the model is ME*
        loads = torch.tensor(line["experts/load"]["1"], dtype=torch.float64) / 100
        # They are told in whole percent of an even load.
        assert loads.mean().item() == pytest.approx(1, abs=0.005)
        assert line["experts/max_violation/1"] == pytest.approx(loads.max().item() - 1, abs=0.005)
        share = loads / loads.sum()
        entropy = torch.special.entr(share).sum() / torch.tensor(len(share)).log()
        assert line["experts/entropy/1"] == pytest.approx(entropy.item(), abs=0.01)
        assert line["experts/entropy"] == line["experts/entropy/1"]
        assert line["experts/max_violation"] == line["experts/max_violation/1"]
