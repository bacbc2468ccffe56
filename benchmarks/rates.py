"""What the device at hand does at best, measured in the same run: what floors are made of."""

import functools
import statistics
from collections.abc import Callable
from typing import Any

import torch

COPIED_BYTES = 2**31
SIDE = 8192  # of the square product


@functools.cache
def copy_rate() -> float:
    """Bytes read and written a microsecond, of a large copy on the GPU."""
    source = torch.empty(COPIED_BYTES, dtype=torch.int8, device="cuda")
    target = torch.empty_like(source)
    return 2 * COPIED_BYTES / event_time(lambda: target.copy_(source))


@functools.cache
def product_rate() -> float:
    """Floating-point operations a microsecond, of a large bf16 product of random numbers."""
    a, b = (torch.randn(SIDE, SIDE, device="cuda", dtype=torch.bfloat16) for _ in range(2))
    return 2.0 * SIDE**3 / event_time(lambda: a @ b)


def event_time(run: Callable[[], Any], repeats: int = 12) -> float:
    """Microseconds between two events around a call, the median of several."""
    for _ in range(3):
        run()
    times = []
    for _ in range(repeats):
        start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        torch.cuda.synchronize()
        start.record()
        run()
        end.record()
        torch.cuda.synchronize()
        times.append(start.elapsed_time(end) * 1e3)
    return statistics.median(times)
