"""How things are measured: alternating, warmed up, as medians; memory in a process of its own."""

import importlib
import json
import os
import platform
import signal
import statistics
import subprocess
import sys
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import torch

from benchmarks import turns
from benchmarks.table import OOM, unavailable

ROOT = Path(__file__).parents[1]
GIB = 2**30


def alternate(
    variants: Mapping[str, Callable[[], Any]], repeats: int, clock: Callable[[], float]
) -> dict[str, float]:
    """The median seconds of each variant, by `time.perf_counter` or the processor's time.

    Every variant runs once to warm up; then they take turns, so that what else the machine does
    meets all of them alike. Where two trees are compared (`turns.py`), the first runs alone.
    """

    def timed(run: Callable[[], Any]) -> float:
        start = clock()
        run()
        return clock() - start

    if not turns.compares_peers():
        name, run = next(iter(variants.items()))
        run()
        return {name: statistics.median(turns.samples(lambda: timed(run), repeats, of_turn=1))}
    for run in variants.values():
        run()
    seconds: dict[str, list[float]] = {name: [] for name in variants}
    for _ in range(repeats):
        for name, run in variants.items():
            seconds[name].append(timed(run))
    return {name: statistics.median(taken) for name, taken in seconds.items()}


def peak_memory(function: str, *arguments: Any) -> float | str:
    """GiB that a process needed at most which does nothing but `function(*arguments)`.

    Args:
        function: `module:name`.
        arguments: plain values, passed on as JSON.

    Returns:
        The high-water mark of its resident memory, Python and libraries included; `OOM` where the
        system killed it, `unavailable` with its last line where it failed.
    """
    command = [sys.executable, "-m", "benchmarks.measure", function, json.dumps(arguments)]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False)
    if done.returncode == -signal.SIGKILL or "out of memory" in done.stderr.lower():
        return OOM
    if done.returncode:
        lines = done.stderr.strip().splitlines() or [f"exit status {done.returncode}"]
        return unavailable(lines[-1])
    return int(done.stdout.split()[-1]) * 1024 / GIB


def high_water_mark() -> int:
    """KiB of resident memory that this process has had at most."""
    for line in Path("/proc/self/status").read_text(encoding="utf-8").splitlines():
        if line.startswith("VmHWM:"):
            return int(line.split()[1])
    raise RuntimeError("/proc/self/status has no VmHWM: peak memory is measured on Linux alone")


def machine() -> dict[str, str]:
    """What the figures belong to."""
    facts = {
        "machine": f"{_processor()}, {os.cpu_count()} cores seen, {platform.system()}",
        "threads": str(torch.get_num_threads()),
        "load before": f"{os.getloadavg()[0]:.1f}",
        "versions": f"Python {platform.python_version()}, PyTorch {torch.__version__}",
        "commit": commit(),
    }
    if torch.cuda.is_available():
        facts["device"] = torch.cuda.get_device_name()
    return facts


def commit() -> str:
    """The short hash of HEAD, `+` where files differ from it; `unknown` outside a repository."""

    def git(*arguments: str) -> str:
        done = subprocess.run(
            ["git", *arguments], cwd=ROOT, capture_output=True, text=True, check=True
        )
        return done.stdout.strip()

    try:
        return git("rev-parse", "--short", "HEAD") + ("+" if git("status", "--porcelain") else "")
    except (OSError, subprocess.CalledProcessError):
        return "unknown"


def _processor() -> str:
    for line in Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines():
        if line.startswith("model name"):
            return line.split(":", 1)[1].strip()
    return platform.processor() or platform.machine()


def _main() -> None:
    module, name = sys.argv[1].split(":")
    getattr(importlib.import_module(module), name)(*json.loads(sys.argv[2]))
    print(high_water_mark())


if __name__ == "__main__":
    _main()
