"""One step of training, and the loop around it."""

import time
import zlib
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, field
from typing import Any, Protocol

import torch
from torch import Tensor, nn
from torch.distributed.fsdp import FSDPModule
from torch.nn.parallel import DistributedDataParallel
from torch.optim.lr_scheduler import LRScheduler

from nemotron_v3.data.pieces import PackedRow
from nemotron_v3.data.report import DataReport
from nemotron_v3.layers.moe.load_balancing import ExpertLoad, balance_
from nemotron_v3.model.model import NemotronV3ForCausalLM
from nemotron_v3.parallel import clip_gradients_, gradient_norm
from nemotron_v3.train.batches import Batch, empty_batch, make_batches, mean_square_length
from nemotron_v3.train.optimizer import RoundedAdamW
from nemotron_v3.train.options import TrainOptions
from nemotron_v3.train.passes import PassesAtOnce
from nemotron_v3.train.processes import World


class Data(Protocol):
    """Rows of each step for this process, and the position behind those that were given."""

    largest_token: int

    def __iter__(self) -> Iterator[list[PackedRow]]: ...

    def total_steps(self, at_most: int | None = None) -> int | None: ...

    def state_dict(self) -> dict[str, Any]: ...

    def load_state_dict(self, state: dict[str, Any]) -> None: ...

    def report(self) -> DataReport: ...


class NotFinite(ArithmeticError):
    """The loss or a gradient of a step is NaN or infinite; nothing was updated with it."""

    def __init__(
        self,
        step: int,
        loss: float,
        norm: float,
        batches: Sequence[Batch],
        items: float,
        seed: int,
    ):
        super().__init__(f"step {step}: the loss is {loss}, the gradient's norm {norm}")
        self.step: int = step
        self.seed: int = seed
        self.batches: Sequence[Batch] = batches
        self.items: float = items


@dataclass
class Progress:
    """Where a training stands: what a save holds beside the tensors.

    `data` is the position behind the last finished step; `seconds` are those of steps; `validated`
    is the step that was last measured, and `held_out` tells the rows that it was measured on.
    """

    step: int = 0
    tokens: int = 0
    seconds: float = 0.0
    data: dict[str, Any] = field(default_factory=dict)
    best_loss: float | None = None
    best_step: int | None = None
    validated: int | None = None
    held_out: str | None = None


@dataclass(frozen=True)
class Step:
    """What a step measured.

    `loss` is in nats a target; `tokens`, `targets` and `seconds` are the step's own, `total_tokens`
    those of the training so far; `length` is a document's that attention costs as much for.
    """

    step: int
    tokens: int
    total_tokens: int
    targets: int
    length: float
    seconds: float
    loss: float
    learning_rate: float
    gradient_norm: float
    details: dict[str, Any]


@dataclass
class Trainer:
    """A model and all that moves it.

    Attributes:
        model: the model itself.
        called: what is called in its place: the model, or DDP around it.
        load: counts the experts' tokens, where the model has routers.
        look: measures gradients by kind of block, at some steps.
        signal: the signal that this process was sent, or 0.
        passes: makes several passes at once; None is one after the other.
        signalled: the same of all processes, once a step has asked.
    """

    options: TrainOptions
    world: World
    model: NemotronV3ForCausalLM
    called: nn.Module
    optimizer: torch.optim.Optimizer
    scheduler: LRScheduler
    load: ExpertLoad | None
    progress: Progress
    look: Callable[["Trainer"], dict[str, Any]]
    signal: Callable[[], int]
    passes: PassesAtOnce | None = None
    signalled: int = 0

    def steps(self, data: Data, done: Callable[[], bool]) -> Iterator[Step]:
        """Train until `done`, the data's end or a signal, yielding after every step."""
        self.model.train()
        rows = iter(data)
        while (found := self._next_batches(rows, done)) is not None:
            step = self._step(*found)
            self.progress.data = data.state_dict()
            yield step

    def _next_batches(self, rows: Iterator[list[PackedRow]], done: Callable[[], bool]) -> Any:
        """This process's batches, tokens and targets of all processes, and when it began; None
        where any process is to stop."""
        start = time.perf_counter()
        over = done()
        mine = None if over else next(rows, None)
        batches = make_batches(mine or [], self.options.memory.rows_per_pass, self.world.device)
        tokens = sum(batch.layout.num_tokens for batch in batches)
        targets = sum(batch.targets for batch in batches)
        counted = (tokens, targets) if self.world.counts_rows else (0, 0)
        told = [len(batches), *counted, int(mine is None), self.signal()]
        everyone = list(zip(*self.world.gather(told), strict=True))
        passes, all_tokens, all_targets, ended, signals = everyone
        self.signalled = max(signals)
        if any(ended) or self.signalled:
            return None
        # All processes pass the model equally often: gradients are summed by all of them together.
        batches += [empty_batch(self.world.device)] * (max(passes) - len(batches))
        return batches, sum(all_tokens), sum(all_targets), start

    def _step(self, batches: list[Batch], tokens: int, targets: int, start: float) -> Step:
        progress, options = self.progress, self.options
        number = progress.step + 1
        if not targets:
            raise ValueError(f"step {number} has no label that counts: all of them are -100")
        # What is drawn in a step is a function of the step, and no state that has to be saved.
        seed = zlib.crc32(f"{options.seed}/{number}/{self.world.rank}".encode())
        torch.manual_seed(seed)
        # DDP takes the mean of the processes' gradients, a sharded model their sum.
        averages = isinstance(self.called, DistributedDataParallel)
        items = targets / (self.world.size if averages else 1)
        loss = self._accumulate(batches, items)
        details = self.look(self) if self._looks_at(number) else {}
        norm = self._clip()
        loss = (self.world.mean_(loss) if averages else self.world.sum_(loss)).item()
        if not (_finite(loss) and _finite(norm)):
            self.optimizer.zero_grad()
            raise NotFinite(number, loss, norm, batches, items, seed)
        rate = float(self.scheduler.get_last_lr()[0])
        self.optimizer.step()
        self.optimizer.zero_grad()
        if self.load is not None:
            move = options.optimizer.balance * rate / options.optimizer.learning_rate
            reduce = self.world.sum_ if self.world.size > 1 else None
            balance_(self.load, move, reduce=reduce)
        progress.step, progress.tokens = number, progress.tokens + tokens
        seconds = time.perf_counter() - start
        progress.seconds += seconds
        self.scheduler.step()
        length = sum(mean_square_length(b.layout) for b in batches) / len(batches)
        return Step(
            number, tokens, progress.tokens, targets, length, seconds, loss, rate, norm, details
        )

    def _accumulate(self, batches: list[Batch], items: float) -> Tensor:
        """Add up the gradients of the batches; their loss is the sum over targets by `items`."""
        if self.passes is not None:
            return self.passes.accumulate(self.model, batches, items)
        total = torch.zeros((), dtype=torch.float32, device=self.world.device)
        for i, batch in enumerate(batches):
            with self._reducing(i == len(batches) - 1):
                loss = self.called(**batch.arguments(), num_items_in_batch=items).loss
                loss.backward()
            total += loss.detach()
        return total

    def _clip(self) -> float:
        """Shorten the gradient where it is too long; gives its norm before."""
        parameters = list(self.model.parameters())
        total = gradient_norm(parameters)
        longest = self.options.optimizer.clip_norm
        norm = total.item()
        # The norm is read for the log anyway, and a pass over all gradients saved where it fits, or
        # where the optimiser shortens them as it reads them.
        if isinstance(self.optimizer, RoundedAdamW):
            self.optimizer.scale = min(1.0, longest / norm) if norm else 1.0
        elif norm > longest:
            clip_gradients_(parameters, longest, total)
        return norm

    def _reducing(self, last: bool) -> AbstractContextManager[None]:
        """Gradients meet those of other processes in the last pass alone."""
        if isinstance(self.called, DistributedDataParallel) and not last:
            return self.called.no_sync()
        if isinstance(self.called, FSDPModule):
            self.called.set_requires_gradient_sync(last)
        return nullcontext()

    def _looks_at(self, number: int) -> bool:
        every = self.options.log.details
        return bool(every) and (number == 1 or number % every == 0)


@torch.no_grad()
def validation_loss(
    model: nn.Module, steps: Sequence[list[PackedRow]], rows_per_pass: int, world: World
) -> float:
    """Nats a target over rows that are not trained on, those of all processes."""
    total = torch.zeros(2, dtype=torch.float64, device=world.device)
    training = model.training
    model.eval()
    try:
        for rows in steps:
            batches = make_batches(rows, rows_per_pass, world.device)
            passes = max(count for (count,) in world.gather([len(batches)]))
            for batch in [*batches, *[empty_batch(world.device)] * (passes - len(batches))]:
                # Processes that share the tokens have a part of the loss each, and all targets.
                loss = model(**batch.arguments()).loss
                counted = batch.targets if world.counts_rows else 0
                total += torch.stack([loss.double() * batch.targets, total.new_tensor(counted)])
    finally:
        model.train(training)
    nats, targets = world.sum_(total).tolist()
    return nats / max(targets, 1)


def _finite(x: float) -> bool:
    return x - x == 0
