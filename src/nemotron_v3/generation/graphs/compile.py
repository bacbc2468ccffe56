"""Calls that compile kernels, made at once: Triton's compiler and ptxas run beside Python."""

import os
from collections.abc import Callable, Hashable, Iterable
from concurrent.futures import ThreadPoolExecutor
from contextlib import nullcontext
from functools import partial
from typing import Any

import torch
from torch import Tensor

Call = Callable[[], object]
MOST_THREADS = 16


def distinct(calls: Iterable[Call]) -> list[Call]:
    """Of calls that differ in their tensors' values and addresses alone, the first."""
    found: dict[Hashable, Call] = {}
    for call in calls:
        if isinstance(call, partial):
            key = call.func, _kind(call.args), _kind(tuple(sorted(call.keywords.items())))
        else:
            key = id(call)
        found.setdefault(key, call)
    return list(found.values())


def _kind(value: Any) -> Hashable:
    """What a kernel may be compiled for."""
    if isinstance(value, Tensor):
        return value.dtype, tuple(value.shape), value.stride()
    if isinstance(value, tuple):
        return tuple(map(_kind, value))
    return value


def at_once(calls: Iterable[Call], device: torch.device, threads: int | None = None) -> None:
    """Make all calls, each in a thread of its own as far as there are some.

    Args:
        device: of their tensors.
        threads: at most; the processor's cores, up to 16, by default.

    Raises:
        Exception: what the first call that fails raises, once all have ended.
    """

    def run(call: Call) -> None:
        # Both are a thread's own.
        on_device = torch.cuda.device(device) if device.type == "cuda" else nullcontext()
        with torch.no_grad(), on_device:
            call()

    threads = threads or min(MOST_THREADS, os.cpu_count() or 1)
    with ThreadPoolExecutor(threads, "nemotron_v3-compile") as pool:
        for done in [pool.submit(run, call) for call in calls]:
            done.result()
