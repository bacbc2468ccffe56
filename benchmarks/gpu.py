"""How work on a GPU is measured: microseconds of a replay or of the host's clock, and memory."""

import gc
import statistics
import time
from collections.abc import Callable
from typing import Any

import torch

from benchmarks import turns

FLUSH_BYTES = 256 * 2**20


def gpu_time(run: Callable[[], Any], repeats: int = 20) -> float:
    """Microseconds of one replay of `run`, captured, with a cold cache: the median."""
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        for _ in range(2):
            run()
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        run()
    flush = torch.empty(FLUSH_BYTES, dtype=torch.int8, device="cuda")

    def replay() -> float:
        start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        flush.zero_()
        start.record()
        graph.replay()
        end.record()
        torch.cuda.synchronize()
        return start.elapsed_time(end) * 1e3

    return statistics.median(turns.samples(replay, repeats))


def wall_time(run: Callable[[], Any], repeats: int = 20) -> float:
    """Microseconds of the host's clock from a call to its result: the median."""
    for _ in range(3):
        run()

    def call() -> float:
        torch.cuda.synchronize()
        start = time.perf_counter()
        run()
        torch.cuda.synchronize()
        return (time.perf_counter() - start) * 1e6

    return statistics.median(turns.samples(call, repeats))


def peak_memory(run: Callable[[], Any]) -> float:
    """MiB that `run` needs at most, above what was allocated before it."""
    run()
    gc.collect()
    torch.cuda.synchronize()
    torch.cuda.reset_peak_memory_stats()
    before = torch.cuda.memory_allocated()
    run()
    torch.cuda.synchronize()
    return (torch.cuda.max_memory_allocated() - before) / 2**20
