"""Work that is spread over processes, with the results in order."""

import multiprocessing
import os
import pickle
import signal
import threading
from collections import deque
from collections.abc import Callable, Generator, Iterable
from concurrent.futures import Future, ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from typing import Any

AHEAD = 4  # items a process that are done or begun before their turn

_task: Callable[[Any], Any] | None = None  # of this process, if it is a worker


def run_in_order(
    task: Callable[[Any], Any], items: Iterable[Any], workers: int
) -> Generator[Any, None, None]:
    """`task(item)` for each item in order, by so many processes; 0 does it in this one.

    A process is started anew, so that neither threads nor a GPU of this one are copied, and ends
    with this one, also where this one is killed. No more than `AHEAD` items a process wait.

    Args:
        task: can be pickled; it is sent once to each process.

    Raises:
        Exception: whatever `task` raises, with its message.
        RuntimeError: a process ended without a word, as one that is out of memory.
    """
    if workers == 0:
        yield from map(task, items)
        return
    pool = ProcessPoolExecutor(
        workers, multiprocessing.get_context("spawn"), _start, (pickle.dumps(task),)
    )
    waiting: deque[Future] = deque()
    try:
        for item in items:
            waiting.append(pool.submit(_run, item))
            if len(waiting) >= AHEAD * workers:
                yield waiting.popleft().result()
        while waiting:
            yield waiting.popleft().result()
    except BrokenProcessPool:
        raise RuntimeError(
            "a worker process ended without a word: it may have run out of memory (give fewer "
            "workers, or 0), or the program that starts it has no `if __name__ == '__main__':`"
        ) from None
    finally:
        pool.shutdown(wait=True, cancel_futures=True)


def _start(task: bytes) -> None:
    """Make this process a worker."""
    global _task
    # It is the parent that a Ctrl-C is for, which then ends this process.
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    threading.Thread(target=_end_with_parent, daemon=True).start()
    # Each process has one core: the tokeniser must not take them all.
    os.environ["TOKENIZERS_PARALLELISM"] = "false"
    _task = pickle.loads(task)


def _end_with_parent() -> None:
    parent = multiprocessing.parent_process()
    assert parent is not None, "only a worker has a parent"
    parent.join()
    os._exit(1)


def _run(item: Any) -> Any:
    assert _task is not None, "_start comes first"
    return _task(item)
