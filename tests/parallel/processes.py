"""Processes over gloo that run a function each, for tests."""

import os
import sys
import tempfile
import time
from collections.abc import Callable, Sequence
from datetime import timedelta
from pathlib import Path

import torch
import torch.distributed as dist
import torch.multiprocessing as mp

SECONDS = 240


def run(workers: Sequence[Callable[[int], None]], size: int) -> None:
    """Each worker in turn, called with the rank in `size` processes; one start for all of them.

    A failure or a hang in a process fails the test.
    """
    with tempfile.TemporaryDirectory() as folder:
        meeting = str(Path(folder) / "meeting")
        context = mp.spawn(_process, (tuple(workers), size, meeting), nprocs=size, join=False)
        deadline = time.monotonic() + SECONDS
        try:
            while not context.join(timeout=1):
                assert time.monotonic() < deadline, f"not finished after {SECONDS} s"
        finally:
            for process in context.processes:
                process.kill()


def _process(rank: int, workers: Sequence[Callable[[int], None]], size: int, meeting: str) -> None:
    torch.set_num_threads(1)
    if sys.platform == "linux":  # the host's name may lead to an address nobody answers at
        os.environ.setdefault("GLOO_SOCKET_IFNAME", "lo")
    dist.init_process_group(
        "gloo",
        init_method=f"file://{meeting}",
        rank=rank,
        world_size=size,
        timeout=timedelta(seconds=SECONDS),
    )
    for worker in workers:
        try:
            worker(rank)
        except Exception as error:
            error.add_note(f"in {worker}")
            raise
    dist.barrier()
    # Not the usual way out: gloo's threads, still running then, now and then abort the process.
    os._exit(0)
