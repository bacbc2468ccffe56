"""Threads of a CPU as a verb settles them."""

import sys


def settle_threads(threads: int | None) -> None:
    """Let torch use so many threads (None is all cores) that spin for a bounded time; a program
    that has loaded torch itself has settled how they wait."""
    if "torch" not in sys.modules:
        from nemotron_v3.config import threads as of_torch

        of_torch.settle_threads(threads)
    elif threads is not None:
        sys.modules["torch"].set_num_threads(threads)
