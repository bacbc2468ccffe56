"""Runs that Weights & Biases shows: a stand-in for its package notes what it is told."""

import sys
from dataclasses import dataclass, field
from types import SimpleNamespace
from typing import Any

import pytest

from nemotron_v3.train.options import LogOptions, SaveOptions, ScheduleOptions
from nemotron_v3.train.run import train
from tests.train.test_run import SILENT, Crash, crash_after, lines


@dataclass
class Shown:
    asked: dict[str, Any]
    logged: dict[int, dict[str, float]] = field(default_factory=dict)
    finished: bool = False

    def log(self, numbers: dict[str, float], step: int) -> None:
        self.logged.setdefault(step, {}).update(numbers)

    def finish(self) -> None:
        self.finished = True


@pytest.fixture
def runs(monkeypatch) -> list[Shown]:
    told: list[Shown] = []

    def init(**asked: Any) -> Shown:
        told.append(Shown(asked))
        return told[-1]

    monkeypatch.setitem(sys.modules, "wandb", SimpleNamespace(init=init))
    return told


def test_it_has_the_numbers_of_metrics_and_goes_on_with_its_own_run(options, tmp_path, runs):
    """Two runs in folders of one name are two."""
    log = LogOptions(wandb="mine")
    asked = options(log=log, save=SaveOptions(every=2), schedule=ScheduleOptions(steps=4))
    with pytest.raises(Crash):
        train(asked, **SILENT, after_step=crash_after(3))
    train(asked, resume=True, **SILENT)
    other = options(out=tmp_path / "elsewhere" / "run", log=log, schedule=ScheduleOptions(steps=1))
    train(other, **SILENT)
    first, second, third = runs
    assert first.asked["id"] == second.asked["id"] != third.asked["id"]
    assert {run.asked["name"] for run in runs} == {"run"} and first.asked["project"] == "mine"
    assert second.asked["resume"] == "allow" and all(run.finished for run in runs)
    shown = first.logged | second.logged
    for line in lines(asked.out):
        assert shown[line["step"]]["loss"] == line["loss"]


def test_without_its_package_it_is_an_error_before_anything_is_written(options, monkeypatch):
    monkeypatch.setitem(sys.modules, "wandb", None)
    asked = options(log=LogOptions(wandb="mine"))
    with pytest.raises(ValueError, match="pip install wandb"):
        train(asked, **SILENT)
    assert not asked.out.exists()
