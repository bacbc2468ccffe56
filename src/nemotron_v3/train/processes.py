"""The processes that train together: who they are, what they tell each other, and who has died."""

import contextlib
import json
import os
import socket
import sys
import threading
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from datetime import timedelta
from typing import Any, cast

import torch
import torch.distributed as dist
from torch import Tensor

from nemotron_v3.train.interrupts import Stopped

BEAT = 1.0  # seconds between signs of life
SILENCE = 30.0  # seconds without one: the process is dead
WAIT = timedelta(minutes=10)  # for a collective, where the others live: compiling takes long


@dataclass(frozen=True)
class World:
    """This process among those that train one model; `size` is 1 without torchrun.

    Every `cp` processes, of ranks that follow each other, share the tokens of the same rows.
    """

    rank: int
    size: int
    device: torch.device
    cp: int = 1

    @property
    def first(self) -> bool:
        """Whether this is the process that writes and speaks."""
        return self.rank == 0

    @property
    def counts_rows(self) -> bool:
        """Whether this process is the one among those with its rows that counts them."""
        return self.rank % self.cp == 0

    def gather(self, values: Sequence[int]) -> list[list[int]]:
        """The integers of every process, by rank; through the host."""
        if self.size == 1:
            return [list(values)]
        mine = torch.tensor(values, dtype=torch.int64)
        parts = [torch.empty_like(mine) for _ in range(self.size)]
        dist.all_gather(parts, mine)
        return [part.tolist() for part in parts]

    def mean_(self, tensor: Tensor) -> Tensor:
        """The mean over the processes, in place."""
        if self.size > 1:
            dist.all_reduce(tensor)
            tensor /= self.size
        return tensor

    def sum_(self, tensor: Tensor) -> Tensor:
        """The sum over the processes, in place."""
        if self.size > 1:
            dist.all_reduce(tensor)
        return tensor

    def told(self, value: Any) -> Any:
        """What the first process says, on all of them."""
        if self.size == 1:
            return value
        box = [value]
        dist.broadcast_object_list(box, src=0)
        return box[0]

    def collect(self, value: Any) -> list[Any]:
        """What every process says, by rank, on all of them."""
        if self.size == 1:
            return [value]
        parts = [None] * self.size
        dist.all_gather_object(parts, value)
        return parts

    def wait(self) -> None:
        """Until all are here."""
        if self.size > 1:
            dist.barrier()


def make_device(name: str | None, local_rank: int = 0) -> torch.device:
    """The device to train on.

    Raises:
        ValueError: nothing can be computed on it.
    """
    name = name or ("cuda" if torch.cuda.is_available() else "cpu")
    try:
        device = torch.device(name)
        if device.type == "cuda" and device.index is None:
            device = torch.device("cuda", local_rank)
        torch.empty(1, device=device).cpu()
    except (RuntimeError, AssertionError, NotImplementedError) as error:
        why = str(error).strip().partition("\n")[0]
        raise ValueError(f"nothing can be computed on model.device {name}: {why}") from error
    return device


def rank_and_size() -> tuple[int, int]:
    """Of this process, as torchrun tells it; (0, 1) without it."""
    return int(os.environ.get("RANK", "0")), int(os.environ.get("WORLD_SIZE", "1"))


def rows_of(cp: int) -> tuple[int, int]:
    """Which part of the rows of a step this process has, and of how many parts: those that share
    tokens have the same.

    Raises:
        ValueError: so many do not divide the processes.
    """
    rank, size = rank_and_size()
    if size % cp:
        raise ValueError(
            f"plan.cp is {cp}, which does not divide the {size} processes: as many share the "
            "tokens of each row"
        )
    return rank // cp, size // cp


@contextlib.contextmanager
def processes(device: str | None, cp: int = 1) -> Iterator[World]:
    """The world that torchrun has made, or a world of one process without it; `cp` of them share
    the tokens of a row.

    A process that dies ends the others within `SILENCE`, which say its rank, host and number.
    """
    if rank_and_size()[1] == 1:
        yield World(0, 1, make_device(device))
        return
    place = make_device(device, int(os.environ.get("LOCAL_RANK", "0")))
    if place.type == "cuda":
        torch.cuda.set_device(place)
    # Gloo carries what processes tell each other on the host, whatever carries the gradients.
    backend = "cpu:gloo,cuda:nccl" if place.type == "cuda" else "gloo"
    dist.init_process_group(backend, timeout=WAIT)
    world = World(dist.get_rank(), dist.get_world_size(), place, cp)
    watch = Watch(world)
    stopped: Stopped | None = None
    try:
        try:
            yield world
        except Stopped as told:  # all of them are, after the same step
            stopped = told
        dist.barrier()
    except RuntimeError as error:
        dead = watch.dead(SILENCE + 5 * BEAT)
        if dead is not None:
            raise RuntimeError(f"{dead} has died: {error}") from error
        raise
    finally:
        watch.close()
    # The first process keeps the stores that the others are connected to, and goes last.
    if not world.first:
        dist.destroy_process_group()
    watch.part(SILENCE)
    if world.first:
        dist.destroy_process_group()
    if stopped is not None:
        raise stopped


class Watch:
    """Signs of life of every process, and the end of this one when another has none."""

    def __init__(self, world: World):
        host = os.environ.get("MASTER_ADDR", "localhost")
        # torch documents the name, and its types do not give it out.
        tcp_store = cast(Any, dist).TCPStore
        store = None
        if world.first:
            store = tcp_store(host, 0, is_master=True, wait_for_workers=False)
        port = world.told(store.port if store else None)
        # A connection of its own for the thread: the first process's other one serves.
        self._keep = store
        self._store = tcp_store(host, port, is_master=False, timeout=timedelta(seconds=SILENCE))
        self._world = world
        self._seen: dict[int, tuple[bytes, float]] = {}
        self._names: dict[int, str] = {}
        self._closed = threading.Event()
        own = f"rank {world.rank} (process {os.getpid()} on {socket.gethostname()})"
        self._store.set(f"name {world.rank}", json.dumps(own))
        self._beat(0)
        world.wait()
        for rank in range(world.size):
            self._names[rank] = json.loads(self._store.get(f"name {rank}"))
        self._thread = threading.Thread(target=self._run, name="signs of life", daemon=True)
        self._thread.start()

    def dead(self, within: float) -> str | None:
        """Who has died, where somebody is found to within so many seconds."""
        deadline = time.monotonic() + within
        while time.monotonic() < deadline:
            if (rank := self._silent(SILENCE / 2)) is not None:
                return self._names[rank]
            time.sleep(BEAT)
        return None

    def close(self) -> None:
        """No more signs are given or waited for."""
        self._closed.set()
        self._thread.join(2 * SILENCE)
        with contextlib.suppress(RuntimeError):  # the store has gone with the first process
            self._store.set(f"beat {self._world.rank}", "done")

    def part(self, seconds: float) -> None:
        """Say that this process needs no store any more; the first one waits so long for all."""
        with contextlib.suppress(RuntimeError):
            self._store.set(f"parted {self._world.rank}", "")
            if self._world.first:
                everyone = [f"parted {rank}" for rank in range(self._world.size)]
                self._store.wait(everyone, timedelta(seconds=seconds))

    def _beat(self, count: int) -> None:
        self._store.set(f"beat {self._world.rank}", str(count))

    def _run(self) -> None:
        count = 0
        while not self._closed.wait(BEAT):
            count += 1
            try:
                self._beat(count)
                self._look()
            except RuntimeError:
                self._seen.setdefault(0, (b"", time.monotonic()))  # who keeps the store is silent
            rank = self._silent(SILENCE)
            if rank is not None and not self._closed.is_set():
                print(f"nemotron-v3: {self._names[rank]} has died: stopping", file=sys.stderr)
                sys.stderr.flush()
                os._exit(1)

    def _look(self) -> None:
        for rank in range(self._world.size):
            beat = self._store.get(f"beat {rank}")
            if rank not in self._seen or self._seen[rank][0] != beat:
                self._seen[rank] = beat, time.monotonic()

    def _silent(self, seconds: float) -> int | None:
        now = time.monotonic()
        silent = [
            (when, rank)
            for rank, (beat, when) in list(self._seen.items())
            if rank != self._world.rank and beat != b"done" and now - when > seconds
        ]
        return min(silent)[1] if silent else None
