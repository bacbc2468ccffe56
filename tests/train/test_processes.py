"""Runs of several processes over gloo: what they compute, save, and do when one of them dies."""

import os
import signal
import time
from dataclasses import replace

import pytest
import torch
from safetensors.torch import load_file

from nemotron_v3.train.options import (
    LoraOptions,
    OptimizerOptions,
    SaveOptions,
    ScheduleOptions,
    TrainOptions,
)
from tests.train.fakes import made_up_options
from tests.train.launch import SECONDS, finish, kill, start
from tests.train.test_run import SILENT, losses, same_weights, train

pytestmark = [
    pytest.mark.integration,
    pytest.mark.skipif(not hasattr(os, "fork"), reason="needs fork"),
]


def run(options: TrainOptions, size: int) -> None:
    if size == 1:
        resume = (options.out / "train.toml").exists()
        train(options, resume=resume, **SILENT)
        return
    ended = finish(start(options, size))
    assert [status for status, _ in ended] == [0] * size, ended
    assert not any("sendBytes" in text or "recv" in text for _, text in ended), ended


@pytest.fixture
def asked(options, tmp_path):
    def made(name: str, **changes) -> TrainOptions:
        told = {
            "out": tmp_path / name,
            "data": made_up_options(rows=6),
            "schedule": ScheduleOptions(steps=9),
            "save": SaveOptions(every=3),
        }
        return options(**told | changes)

    return made


@pytest.mark.parametrize(("parallel", "size"), [("ddp", 2), ("fsdp", 2), ("fsdp", 3)])
def test_processes_train_what_one_does(asked, parallel, size):
    """5 rows, so that one process has fewer than the others."""
    data = made_up_options(rows=5)
    alone, many = (asked(n, data=data, parallel=parallel) for n in ("alone", "many"))
    run(alone, 1)
    run(many, size)
    first, second = losses(alone.out), losses(many.out)
    assert first.keys() == second.keys()
    assert second[1] == pytest.approx(first[1], rel=1e-6)
    assert all(second[n] == pytest.approx(first[n], rel=1e-4) for n in first)


@pytest.mark.parametrize(("parallel", "size"), [("ddp", 2), ("fsdp", 3)])
def test_processes_move_matrices_by_muon_as_one_does(asked, parallel, size):
    """Of matrices that processes share each has a part; three do not divide the experts evenly.
    A run that goes on does so to the bit."""
    muon = OptimizerOptions(kind="muon", learning_rate=1e-2)
    schedule = ScheduleOptions(steps=6)
    told = {"parallel": parallel, "optimizer": muon, "schedule": schedule}
    alone, many = (asked(n, **told) for n in ("alone", "many"))
    run(alone, 1)
    run(many, size)
    first, second = losses(alone.out), losses(many.out)
    assert all(second[n] == pytest.approx(first[n], rel=1e-4) for n in first)
    ended_by(asked("parted", **told), size, 3)
    run(asked("parted", **told), size)
    assert losses(asked("parted", **told).out) == second


@pytest.mark.parametrize("parallel", ["ddp", "fsdp"])
def test_processes_train_the_adapter_that_one_does(asked, parallel):
    pytest.importorskip("peft")
    from nemotron_v3.hf import lora

    adapted = LoraOptions(rank=2, groups=("attention", "mamba", "routed"))
    alone, many = (
        asked(n, parallel=parallel, lora=adapted, schedule=ScheduleOptions(steps=3))
        for n in ("alone", "many")
    )
    train(alone, adapters=lora, **SILENT)
    run(many, 2)
    first, second = losses(alone.out), losses(many.out)
    assert all(second[n] == pytest.approx(first[n], rel=1e-5) for n in first)
    written = [load_file(o.out / "adapter_model.safetensors") for o in (alone, many)]
    assert written[0].keys() == written[1].keys() and len(written[0]) == 16
    for name, tensor in written[0].items():
        assert torch.allclose(written[1][name], tensor, atol=1e-4), name


@pytest.mark.parametrize(("parallel", "size"), [("ddp", 2), ("ddp", 3), ("fsdp", 2), ("fsdp", 3)])
def test_killed_processes_go_on_to_the_bit(asked, parallel, size):
    whole = asked("whole", parallel=parallel)
    run(whole, size)
    options = asked("killed", parallel=parallel)
    processes = start(options, size)
    deadline = time.monotonic() + SECONDS
    while not (options.out / "checkpoints" / "step-00000003").exists():
        assert time.monotonic() < deadline
        time.sleep(0.05)
    kill(processes)
    run(options, size)
    assert losses(options.out) == losses(whole.out)
    assert same_weights(options.out, whole.out)


def test_from_two_to_three_to_one_process_every_step_sees_its_tokens(asked, tmp_path):
    whole, options = asked("whole"), asked("moved")
    run(whole, 1)
    for size, steps in ((2, 3), (3, 6), (1, 9)):
        # The schedule of the whole run: only where it ends differs.
        ended = replace(options, schedule=replace(options.schedule, steps=9))
        if steps < 9:
            ended_by(ended, size, steps)
        else:
            run(ended, size)
    first, second = losses(whole.out), losses(options.out)
    assert second[1] == pytest.approx(first[1], rel=1e-6)
    assert all(second[n] == pytest.approx(first[n], rel=1e-4) for n in first)
    rows = [set(map(int, p.read_text().split())) for p in tmp_path.glob("moved-rows-*")]
    assert set.union(*rows) >= set(range(36))


def ended_by(options: TrainOptions, size: int, step: int) -> None:
    """A run that SIGTERM ends once a step is saved."""
    processes = start(options, size)
    deadline = time.monotonic() + SECONDS
    while not (options.out / "checkpoints" / f"step-{step:08d}").exists():
        assert time.monotonic() < deadline
        time.sleep(0.02)
    processes[-1].send(signal.SIGTERM)
    ended = finish(processes)
    assert all("--resume goes on" in text for _, text in ended), ended


@pytest.mark.parametrize("dies", [0, 1])
def test_a_rank_that_dies_ends_the_others_with_its_name(asked, dies):
    options = asked("dies", schedule=ScheduleOptions(steps=1000))
    began = time.monotonic()
    ended = finish(start(options, 2, dies=(dies, 4)))
    assert time.monotonic() - began < 120
    assert ended[dies][0] == -signal.SIGKILL
    status, text = ended[1 - dies]
    assert status not in (0, -signal.SIGKILL) and f"rank {dies} (process" in text, text
