"""Steps that are captured once and kept with their model.

A graph holds addresses: of the weights, so one that was moved or replaced makes it worthless, and
of its batch's buffers, so two generations at a time have a graph each. It holds numbers too, such
as a router's `top_k`. Values that change in place are read anew by every replay.
"""

import logging
import threading
import time
import weakref
from dataclasses import dataclass, field

import torch
from torch import Tensor

from nemotron_v3.cache import NemotronHybridCache
from nemotron_v3.generation.choice import Asked
from nemotron_v3.generation.graphs.compile import at_once, distinct
from nemotron_v3.generation.graphs.plan import Plan
from nemotron_v3.generation.graphs.slots import Slots
from nemotron_v3.generation.graphs.updates import fixed_of
from nemotron_v3.model.protocol import CausalLM

SMALLEST_CAPACITY = 1024
# Graphs that a model keeps besides those in use.
KEPT = 4

_log = logging.getLogger("nemotron_v3")


@dataclass(eq=False)
class Graph:
    """One step for a batch of slots.

    Attributes:
        weights: where the model's tensors were when it was captured, and its modules' numbers.
        asked: of the choice of tokens in it; None where it ends with the logits.
        seconds: what the capture took, compilation of kernels included.
    """

    plan: Plan
    weights: tuple[object, ...]
    asked: Asked | None = None
    busy: bool = True
    seconds: float = 0.0
    cuda: torch.cuda.CUDAGraph | None = field(default=None, repr=False)

    @property
    def slots(self) -> Slots:
        return self.plan.slots

    @property
    def key(self) -> tuple[object, ...]:
        slots = self.slots
        return slots.rows, slots.capacity, slots.window, self.weights, self.asked

    def capture(self) -> None:
        """Record the step; no slot is active, so that it changes nothing."""
        began = time.perf_counter()
        if self.plan.logits.is_cuda:
            at_once(distinct(self.plan.every_call), self.plan.logits.device)
            stream = torch.cuda.Stream()
            stream.wait_stream(torch.cuda.current_stream())
            with torch.cuda.stream(stream):
                for _ in range(2):  # what is compiled or set up at a first call is so now
                    self.plan()
            torch.cuda.current_stream().wait_stream(stream)
            self.cuda = torch.cuda.CUDAGraph()
            with torch.cuda.graph(self.cuda):
                self.plan()
        self.seconds = time.perf_counter() - began
        _log.info(
            "generation: a step of %d rows of at most %d tokens is a CUDA graph (%.2f s, %.0f MiB)",
            self.slots.rows,
            self.slots.capacity,
            self.seconds,
            self.slots.nbytes / 2**20,
        )

    def replay(self) -> Tensor:
        if self.cuda is None:
            self.plan()
        else:
            self.cuda.replay()
        return self.plan.logits


class Graphs:
    """The graphs of one model."""

    def __init__(self) -> None:
        self._graphs: list[Graph] = []
        self._lock = threading.Lock()

    def take(
        self,
        model: CausalLM,
        cache: NemotronHybridCache,
        length: int,
        asked: Asked | None = None,
    ) -> Graph:
        """A graph that nobody uses, for the rows of a cache and rows of `length` tokens."""
        weights = fixed_by(model)
        sizes = row_slots(cache.batch_size), capacity_of(length)
        key = (*sizes, cache.rollback_window, weights, asked)
        with self._lock:
            self._graphs = [g for g in self._graphs if g.weights == weights]
            for graph in self._graphs:
                if graph.key == key and not graph.busy:
                    graph.busy = True
                    self._graphs.remove(graph)
                    self._graphs.append(graph)  # the last one used stands last
                    return graph
            idle = [graph for graph in self._graphs if not graph.busy]
            for graph in idle[: max(0, len(idle) - KEPT + 1)]:
                self._graphs.remove(graph)
        graph = Graph(Plan(model, Slots(cache, *sizes), asked), weights, asked)
        graph.capture()
        with self._lock:
            self._graphs.append(graph)
        return graph

    def clear(self) -> None:
        with self._lock:
            self._graphs = [graph for graph in self._graphs if graph.busy]


_of_models: "weakref.WeakKeyDictionary[CausalLM, Graphs]" = weakref.WeakKeyDictionary()


def graphs_of(model: CausalLM) -> Graphs:
    """The graphs that a model has; they go with it."""
    return _of_models.setdefault(model, Graphs())


def fixed_by(model: CausalLM) -> tuple[object, ...]:
    """What a capture fixes: where a model's tensors are, and numbers such as a router's `top_k`."""
    addresses = (tensor.data_ptr() for tensor in (*model.parameters(), *model.buffers()))
    numbers = (
        value
        for module in model.modules()
        for name, value in vars(module).items()
        if name != "training" and _is_number(value)
    )
    updates = (fixed for module in model.modules() for fixed in fixed_of(module))
    return (*addresses, *numbers, *updates)


def _is_number(value: object) -> bool:
    if isinstance(value, tuple):
        return all(map(_is_number, value))
    return isinstance(value, bool | int | float)


def row_slots(rows: int) -> int:
    """Slots for so many rows: a power of two, and from 64 on a multiple of 32."""
    return 1 << (rows - 1).bit_length() if rows <= 64 else -(-rows // 32) * 32


def capacity_of(length: int) -> int:
    """Places for rows of so many tokens: a power of two."""
    return max(SMALLEST_CAPACITY, 1 << (length - 1).bit_length())
