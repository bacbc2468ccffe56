"""Killed at any moment, a run goes on as if nothing had happened."""

import json
import os
import random
import time
from dataclasses import replace
from pathlib import Path

import pytest

from nemotron_v3.checkpoint import open_checkpoint
from nemotron_v3.train.checkpoints import FOLDER, saved_steps
from nemotron_v3.train.options import SaveOptions, ScheduleOptions, TrainOptions
from tests.train.launch import finish, kill, start
from tests.train.test_run import losses, same_weights

pytestmark = pytest.mark.skipif(not hasattr(os, "fork"), reason="needs fork")


def ran(options: TrainOptions, size: int, seconds: float | None = None) -> bool:
    """Run in so many processes, all killed after so long; whether they came to their end."""
    ranks = start(options, size)
    if seconds is None:
        ended = finish(ranks)
        assert [status for status, _ in ended] == [0] * size, ended
        return True
    deadline = time.monotonic() + seconds
    while time.monotonic() < deadline and not all(rank.ended() for rank in ranks):
        time.sleep(0.005)
    kill(random.Random(seconds).sample(ranks, size))
    return all(rank.status == 0 for rank in ranks)


def assert_nothing_half_looks_whole(out: Path) -> None:
    for step in saved_steps(out):
        folder = out / FOLDER / f"step-{step:08d}"
        assert (folder / ".metadata").is_file()
        assert json.loads((folder / "state.json").read_text())["progress"]["step"] == step
    if (out / "config.json").exists():
        open_checkpoint(out)


def kill_at_random(
    options: TrainOptions, whole: Path, moments: int, seed: int, size: int = 1
) -> list[int]:
    """Runs that are killed at so many moments, spread over a run's duration; gives the last save
    that each kill left."""
    start = time.monotonic()
    ran(replace(options, out=whole), size)
    duration = time.monotonic() - start
    expected, draw = losses(whole), random.Random(seed)
    left: list[int] = []
    run = 0
    while len(left) < moments:
        asked = replace(options, out=options.out.with_name(f"run{run}"))
        run += 1
        while len(left) < moments:
            # Each run is killed a few times on its way, at its end too.
            if ran(asked, size, draw.uniform(0, duration)):
                break
            assert_nothing_half_looks_whole(asked.out)
            left.append(max(saved_steps(asked.out), default=0))
        ran(asked, size)
        assert losses(asked.out) == expected
        assert same_weights(asked.out, whole)
    return left


def test_a_killed_run_goes_on_to_the_bit(options, tmp_path):
    asked = options(schedule=ScheduleOptions(steps=12), save=SaveOptions(every=2))
    kill_at_random(asked, tmp_path / "whole", moments=3, seed=0)


@pytest.mark.integration
def test_a_run_killed_at_twenty_moments_goes_on_to_the_bit(options, tmp_path):
    asked = options(schedule=ScheduleOptions(steps=40), save=SaveOptions(every=1))
    kill_at_random(asked, tmp_path / "whole", moments=20, seed=1)


@pytest.mark.integration
@pytest.mark.parametrize(("parallel", "size"), [("ddp", 3), ("fsdp", 3)])
def test_processes_killed_at_random_moments_go_on_to_the_bit(options, tmp_path, parallel, size):
    asked = options(schedule=ScheduleOptions(steps=8), save=SaveOptions(every=1), parallel=parallel)
    kill_at_random(asked, tmp_path / "whole", moments=2, seed=size, size=size)
