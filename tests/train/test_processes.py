"""Runs of several processes over gloo: what they compute, save, and do when one of them dies."""

import contextlib
import os
import signal
import socket
import subprocess
import sys
import time
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from nemotron_v3.train.config_file import config_text
from nemotron_v3.train.options import LoraOptions, SaveOptions, ScheduleOptions, TrainOptions
from tests.train.fakes import made_up_options
from tests.train.test_run import SILENT, losses, same_weights, train

pytestmark = pytest.mark.integration

SECONDS = 300
PROGRAM = """
import os, sys, signal
import torch
torch.set_num_threads(1)
from pathlib import Path
from nemotron_v3.train.config_file import read_config
from nemotron_v3.train.options import TrainOptions
from tests.train.fakes import MadeUp
from nemotron_v3.train.run import train

options = read_config(Path(sys.argv[1]), TrainOptions)
resume = (options.out / "train.toml").exists()
seen = options.out.with_name(f"{options.out.name}-rows-{os.environ['RANK']}")

class Seen(MadeUp):
    def row(self, number):
        with seen.open("a") as file:
            print(number, file=file)
        return super().row(number)

dies = os.environ.get("DIES")
def after(step):
    if dies == f"{os.environ['RANK']} {step.step}":
        os.kill(os.getpid(), signal.SIGKILL)

adapters = None
if options.lora.rank:
    from nemotron_v3.hf import lora as adapters

train(options, resume=resume, make_data=Seen, after_step=after, adapters=adapters)
sys.stdout.flush(); sys.stderr.flush()
os._exit(0)  # gloo's threads, still running, now and then abort a process on its usual way out
"""


def start(options: TrainOptions, size: int, **environment: str) -> list[subprocess.Popen]:
    """So many processes, as torchrun starts them."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    recipe = options.out.with_suffix(".toml")
    recipe.write_text(config_text(options))
    told = {
        "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port), "WORLD_SIZE": str(size),
        "OMP_NUM_THREADS": "1", "GLOO_SOCKET_IFNAME": "lo", **environment,
    }  # fmt: skip
    root = Path(__file__).parents[2]
    return [
        subprocess.Popen(
            [sys.executable, "-c", PROGRAM, str(recipe)],
            cwd=root,
            env=os.environ | told | {"RANK": str(rank), "LOCAL_RANK": str(rank)},
            stderr=subprocess.PIPE,
            text=True,
        )
        for rank in range(size)
    ]


def finish(processes: list[subprocess.Popen]) -> list[tuple[int, str]]:
    """The status and the last words of each."""
    try:
        told = [process.communicate(timeout=SECONDS)[1] for process in processes]
        return [(p.returncode, text) for p, text in zip(processes, told, strict=True)]
    finally:
        for process in processes:
            with contextlib.suppress(OSError):
                process.kill()


def run(options: TrainOptions, size: int) -> None:
    if size == 1:
        resume = (options.out / "train.toml").exists()
        train(options, resume=resume, **SILENT)
        return
    ended = finish(start(options, size))
    assert [status for status, _ in ended] == [0] * size, ended


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


@pytest.mark.parametrize(("parallel", "size"), [("ddp", 2), ("fsdp", 2), ("fsdp", 3)])
def test_killed_processes_go_on_to_the_bit(asked, parallel, size):
    whole = asked("whole", parallel=parallel)
    run(whole, size)
    options = asked("killed", parallel=parallel)
    processes = start(options, size)
    deadline = time.monotonic() + SECONDS
    while not (options.out / "checkpoints" / "step-00000003").exists():
        assert time.monotonic() < deadline
        time.sleep(0.05)
    for process in processes:
        process.send_signal(signal.SIGKILL)
    finish(processes)
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
    processes[-1].send_signal(signal.SIGTERM)
    ended = finish(processes)
    assert all("--resume goes on" in text for _, text in ended), ended


@pytest.mark.parametrize("dies", [0, 1])
def test_a_rank_that_dies_ends_the_others_with_its_name(asked, dies):
    options = asked("dies", schedule=ScheduleOptions(steps=1000))
    began = time.monotonic()
    ended = finish(start(options, 2, DIES=f"{dies} 4"))
    assert time.monotonic() - began < 120
    assert ended[dies][0] == -signal.SIGKILL
    status, text = ended[1 - dies]
    assert status not in (0, -signal.SIGKILL) and f"rank {dies} (process" in text, text
