"""Killed at any moment, a run goes on as if nothing had happened."""

import json
import os
import random
import signal
import time
from dataclasses import replace
from pathlib import Path

import pytest

from nemotron_v3.checkpoint import open_checkpoint
from nemotron_v3.train.checkpoints import FOLDER, saved_steps
from nemotron_v3.train.options import SaveOptions, ScheduleOptions, TrainOptions
from nemotron_v3.train.run import train
from tests.train.test_run import SILENT, losses, same_weights

pytestmark = pytest.mark.skipif(not hasattr(os, "fork"), reason="needs fork")


def in_child(options: TrainOptions, seconds: float | None) -> bool:
    """Run in a process of its own, killed after so long; whether it came to its end."""
    child = os.fork()
    if child == 0:
        status = 1
        try:
            train(options, resume=(options.out / "train.toml").exists(), **SILENT)
            status = 0
        finally:
            os._exit(status)
    if seconds is not None:
        time.sleep(seconds)
        os.kill(child, signal.SIGKILL)
    _, status = os.waitpid(child, 0)
    assert seconds is not None or status == 0, "the run failed"
    return status == 0


def assert_nothing_half_looks_whole(out: Path) -> None:
    for step in saved_steps(out):
        folder = out / FOLDER / f"step-{step:08d}"
        assert (folder / ".metadata").is_file()
        assert json.loads((folder / "state.json").read_text())["progress"]["step"] == step
    if (out / "config.json").exists():
        open_checkpoint(out)


def kill_at_random(options: TrainOptions, whole: Path, moments: int, seed: int) -> None:
    """Runs that are killed at so many moments, spread over a run's duration."""
    start = time.monotonic()
    in_child(replace(options, out=whole), None)
    duration = time.monotonic() - start
    expected, draw = losses(whole), random.Random(seed)
    kills = run = 0
    while kills < moments:
        asked = replace(options, out=options.out.with_name(f"run{run}"))
        run += 1
        while kills < moments:
            # Each run is killed a few times on its way, at its end too.
            if in_child(asked, draw.uniform(0, duration)):
                break
            kills += 1
            assert_nothing_half_looks_whole(asked.out)
        in_child(asked, None)
        assert losses(asked.out) == expected
        assert same_weights(asked.out, whole)


def test_a_killed_run_goes_on_to_the_bit(options, tmp_path):
    asked = options(schedule=ScheduleOptions(steps=12), save=SaveOptions(every=2))
    kill_at_random(asked, tmp_path / "whole", moments=3, seed=0)


@pytest.mark.integration
def test_a_run_killed_at_twenty_moments_goes_on_to_the_bit(options, tmp_path):
    asked = options(schedule=ScheduleOptions(steps=40), save=SaveOptions(every=1))
    kill_at_random(asked, tmp_path / "whole", moments=20, seed=1)
