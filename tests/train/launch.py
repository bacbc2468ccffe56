"""Processes that train together, forked from the tests' own: importing torch anew in each would
take longer than what they do."""

import contextlib
import os
import random
import signal
import socket
import sys
import time
import traceback
from dataclasses import dataclass
from pathlib import Path

import torch

from nemotron_v3.train.loop import Step
from nemotron_v3.train.options import TrainOptions
from nemotron_v3.train.run import train
from tests.train.fakes import MadeUp

SECONDS = 300


@dataclass
class Rank:
    """A process that trains; `log` is what it says on stderr."""

    pid: int
    log: Path
    status: int | None = None

    def send(self, number: int) -> None:
        with contextlib.suppress(ProcessLookupError):
            os.kill(self.pid, number)

    def ended(self) -> bool:
        if self.status is None:
            pid, status = os.waitpid(self.pid, os.WNOHANG)
            self.status = os.waitstatus_to_exitcode(status) if pid else None
        return self.status is not None


def start(options: TrainOptions, size: int, dies: tuple[int, int] | None = None) -> list[Rank]:
    """So many processes that begin a run or go on with it, as torchrun starts them.

    `dies` is a rank and the step after which it kills itself.
    """
    told = {
        "MASTER_ADDR": "127.0.0.1",
        "MASTER_PORT": str(free_port()),
        "WORLD_SIZE": str(size),
        "GLOO_SOCKET_IFNAME": "lo",
    }
    ranks = []
    for rank in range(size):
        log = options.out.with_name(f"{options.out.name}-{rank}.log")
        pid = os.fork()
        if pid == 0:
            _be(rank, told | {"RANK": str(rank), "LOCAL_RANK": str(rank)}, log, options, dies)
        ranks.append(Rank(pid, log))
    return ranks


def finish(ranks: list[Rank]) -> list[tuple[int | None, str]]:
    """The status and the words of each."""
    deadline = time.monotonic() + SECONDS
    try:
        while not all(rank.ended() for rank in ranks) and time.monotonic() < deadline:
            time.sleep(0.02)
        return [(rank.status, rank.log.read_text()) for rank in ranks]
    finally:
        kill(ranks)


def kill(ranks: list[Rank]) -> None:
    """End those that live, in the order given, and wait for them."""
    for rank in ranks:
        if not rank.ended():
            rank.send(signal.SIGKILL)
    while not all(rank.ended() for rank in ranks):
        time.sleep(0.01)


def free_port() -> int:
    """A port that nobody listens at, and that the system gives to no connection of its own: what
    it would choose for us may be somebody else's before the processes are there."""
    own = Path("/proc/sys/net/ipv4/ip_local_port_range")
    highest = int(own.read_text().split()[0]) if own.exists() else 32768
    while True:
        port = random.SystemRandom().randrange(10_000, highest)
        with socket.socket() as free, contextlib.suppress(OSError):
            free.bind(("127.0.0.1", port))
            return port


def _be(
    rank: int, told: dict[str, str], log: Path, options: TrainOptions, dies: tuple[int, int] | None
) -> None:
    """One of the processes; never returns."""
    status = 1
    try:
        os.environ.update(told)
        with log.open("w") as file:
            os.dup2(file.fileno(), 2)
        sys.stderr = open(2, "w", closefd=False)  # noqa: SIM115
        torch.set_num_threads(1)

        def after(step: Step) -> None:
            if dies == (rank, step.step):
                os.kill(os.getpid(), signal.SIGKILL)

        adapters = write_on = None
        if options.lora.rank:
            from nemotron_v3.hf import lora as adapters
        if options.log.samples:
            from nemotron_v3.cli.train import _write_on as write_on
        train(
            options,
            resume=(options.out / "train.toml").exists(),
            make_data=_seen_by(rank, options),
            after_step=after,
            adapters=adapters,
            write_on=write_on,
        )
        status = 0
    except BaseException:
        traceback.print_exc()
    finally:
        sys.stderr.flush()
        os._exit(status)


def _seen_by(rank: int, options: TrainOptions) -> type[MadeUp]:
    """Rows that write down which of them were asked for."""
    seen = options.out.with_name(f"{options.out.name}-rows-{rank}")

    class Seen(MadeUp):
        def row(self, number: int):
            with seen.open("a") as file:
                print(number, file=file)
            return super().row(number)

    return Seen
