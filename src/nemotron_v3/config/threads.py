"""Threads of a CPU, and how they wait: settled before torch is loaded, which reads it once."""

import os
import sys

# Turns of a waiting loop before a thread gives its core up. GNU's OpenMP, which torch's builds use,
# turns for milliseconds by default: where the cores are shared, threads that spin keep the one that
# they wait for from running. See docs/training.md for what was measured.
SPIN = 1_000


def settle_threads(threads: int | None = None) -> None:
    """Let torch's threads on a CPU spin for a bounded time while they wait for one another.

    On cores that other programs use too, a loop of a small model is an order of magnitude slower
    without it. To be called before torch is imported; the environment is changed, for the processes
    that are started from here too. What it says already (GOMP_SPINCOUNT, OMP_WAIT_POLICY) stays.

    Args:
        threads: so many; None is as the environment says, else all cores.

    Raises:
        ValueError: less than one thread.
        RuntimeError: torch is loaded, and has read how its threads wait.
    """
    if threads is not None and threads < 1:
        raise ValueError(f"threads is {threads}: give at least 1")
    settled = {"OMP_WAIT_POLICY", "GOMP_SPINCOUNT"} & os.environ.keys()
    if "torch" in sys.modules and not settled:
        raise RuntimeError(
            "torch is loaded, and has read how its threads wait: call settle_threads before "
            f"`import torch`, or start Python with GOMP_SPINCOUNT={SPIN} in its environment"
        )
    if not settled:
        os.environ["GOMP_SPINCOUNT"] = str(SPIN)
    if threads is not None:
        os.environ["OMP_NUM_THREADS"] = str(threads)
        if "torch" in sys.modules:  # too late for the environment
            sys.modules["torch"].set_num_threads(threads)
