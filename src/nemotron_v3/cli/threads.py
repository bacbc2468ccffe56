"""Threads of a CPU, and how they wait: settled before torch is loaded, which reads it once."""

import os
import sys

# Turns of a waiting loop before a thread gives its core up. GNU's OpenMP, which torch's builds use,
# turns for milliseconds by default: where the cores are shared, threads that spin keep the one that
# they wait for from running. See docs/training.md for what was measured.
SPIN = 1_000


def settle_threads(threads: int | None) -> None:
    """Let torch use so many threads (None is all cores) that spin for a bounded time.

    What the environment says already stays.
    """
    if threads is not None:
        os.environ["OMP_NUM_THREADS"] = str(threads)
    if "OMP_WAIT_POLICY" not in os.environ:
        os.environ.setdefault("GOMP_SPINCOUNT", str(SPIN))
    if threads is not None and "torch" in sys.modules:  # too late for the environment
        sys.modules["torch"].set_num_threads(threads)
