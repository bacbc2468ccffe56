"""Work for worker processes, in a file that imports nothing, so that they start in a moment."""

import os
import signal


def third_fails(item: int) -> int:
    if item == 3:
        raise ValueError(f"item {item} is no good")
    return item


def dies(item: int) -> int:
    os.kill(os.getpid(), signal.SIGKILL)
    return item
