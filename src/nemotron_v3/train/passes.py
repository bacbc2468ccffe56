"""Several passes of a step at once on a CPU, on a thread each.

A small model's products are too short to share among cores: threads that make one pass together
wait for each other at every operation, and where other programs use the cores too they wait long.
Threads that make a pass each meet once a step. They share Python's lock, which a pass needs for the
least part of its time.
"""

from collections import deque
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import contextmanager
from typing import Any, TypeVar

import torch
from torch import Tensor, nn

from nemotron_v3.train.batches import Batch
from nemotron_v3.train.options import MemoryOptions
from nemotron_v3.train.processes import World

Gradients = tuple[Tensor | None, ...]
X = TypeVar("X")
Y = TypeVar("Y")


class PassesAtOnce:
    """Threads that make passes of a model side by side.

    Args:
        count: how many of them.
        threads: of the CPU, which they share evenly.
    """

    def __init__(self, count: int, threads: int):
        self.count: int = count
        self.share: int = max(1, threads // count)
        self._pool = ThreadPoolExecutor(count, "pass", torch.set_num_threads, (self.share,))

    @contextmanager
    def sharing(self) -> Iterator[None]:
        """Within it, this thread has a share of the CPU too."""
        before = torch.get_num_threads()
        torch.set_num_threads(self.share)
        try:
            yield
        finally:
            torch.set_num_threads(before)
            self._pool.shutdown()

    def accumulate(self, model: nn.Module, batches: Sequence[Batch], items: float) -> Tensor:
        """Add up the gradients of the batches, in their order; their loss as a scalar in fp32.

        What is added, and in which order, does not depend on how many are under way.
        """
        trained = [p for p in model.parameters() if p.requires_grad]
        total = torch.zeros((), dtype=torch.float32)
        for loss, gradients in self.each(lambda b: _pass(model, trained, b, items), batches):
            total += loss
            for p, gradient in zip(trained, gradients, strict=True):
                if p.grad is None:
                    p.grad = gradient
                elif gradient is not None:
                    p.grad += gradient
        return total

    def each(self, function: Callable[[X], Y], of: Iterable[X]) -> Iterator[Y]:
        """What a function gives of each thing, in their order; as many are under way as there are
        threads."""
        waiting: deque[Future[Y]] = deque()
        try:
            for x in of:
                if len(waiting) == self.count:
                    yield waiting.popleft().result()
                waiting.append(self._pool.submit(function, x))
            while waiting:
                yield waiting.popleft().result()
        finally:
            for future in waiting:  # what uses the weights ends before they are changed
                if not future.cancel():
                    future.exception()


def _pass(
    model: nn.Module, trained: Sequence[nn.Parameter], batch: Batch, items: float
) -> tuple[Tensor, Gradients]:
    loss: Any = model(**batch.arguments(), num_items_in_batch=items).loss
    return loss.detach(), torch.autograd.grad(loss, trained, allow_unused=True)


def passes_at_once(options: MemoryOptions, world: World) -> PassesAtOnce | None:
    """None where passes follow each other: one at a time was asked for, or there is one thread.

    Raises:
        ValueError: several at once on a GPU, or in one of several processes.
    """
    if options.passes_at_once == 1:
        return None
    if world.device.type != "cpu" or world.size > 1:
        place = "a GPU" if world.device.type != "cpu" else f"{world.size} processes"
        raise ValueError(
            f"memory.passes_at_once is {options.passes_at_once}, for one process on a CPU, and "
            f"this is {place}: leave it at 1"
        )
    threads = torch.get_num_threads()
    count = min(options.passes_at_once, threads)
    return PassesAtOnce(count, threads) if count > 1 else None
