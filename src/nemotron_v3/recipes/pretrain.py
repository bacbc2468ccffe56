"""A short pre-training: AdamW, a warm-up, and a decay that ends with the training."""

import math
import signal
import threading
import time
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Self

import torch
from torch import Tensor, nn

from nemotron_v3.data.packing import Pack
from nemotron_v3.model.model import NemotronV3ForCausalLM
from nemotron_v3.model.optim import parameter_groups

LEAST = 0.01  # of the highest learning rate: no step is wasted, and none goes uphill


@dataclass(frozen=True)
class Optimization:
    """AdamW and its schedule.

    Attributes:
        learning_rate: the highest, reached after the warm-up.
        warmup: the fraction of the training over which the rate rises; after it the rate falls in a
            straight line to the end. It is never below LEAST of the highest.
        balance: how far the routers' correction biases move in one step towards experts that got
            fewer tokens than their share (arXiv 2408.15664); it decays with the learning rate.
    """

    learning_rate: float
    weight_decay: float
    warmup: float = 0.1
    betas: tuple[float, float] = (0.9, 0.95)
    clip_norm: float = 1.0
    balance: float = 0.01

    def scale(self, done: float) -> float:
        """The factor of the learning rate when this fraction of the training is done."""
        return max(LEAST, min(done / self.warmup, (1 - done) / (1 - self.warmup)))


@dataclass(frozen=True)
class Step:
    """What a step of training measured; `loss` in nats a token, `seconds` since the start."""

    step: int
    tokens: int
    seconds: float
    loss: float
    bits_per_byte: float
    learning_rate: float
    gradient_norm: float

    @property
    def tokens_per_second(self) -> float:
        return self.tokens / self.seconds


def pretrain(
    model: NemotronV3ForCausalLM,
    packs: Iterator[Pack],
    optimization: Optimization,
    bytes_per_token: float,
    done: Callable[[float, float], float],
) -> Iterator[Step]:
    """Train, yielding after every step; the caller may stop at any of them.

    Args:
        done: the fraction of the training behind us after (steps, seconds). It ends at 1; seconds
            let it follow the clock, steps alone make the run repeatable.
    """
    model.train()
    groups = parameter_groups(model, optimization.weight_decay)
    adamw = torch.optim.AdamW(groups, lr=0.0, betas=optimization.betas, fused=True)
    start = time.perf_counter()
    tokens, step, seconds = 0, 0, 0.0
    with Balancer(model) as balancer:
        while done(step, seconds) < 1:
            # The rate of the step's middle, as far as the clock lets it be foreseen: the first step
            # has none before it, and a last one may end after the training.
            scale = optimization.scale(done(step + 0.5, seconds * (step + 0.5) / max(step, 1)))
            for group in adamw.param_groups:
                group["lr"] = optimization.learning_rate * scale
            pack = next(packs)
            loss = model(input_ids=pack.input_ids, labels=pack.input_ids, layout=pack.layout).loss
            loss.backward()
            norm = nn.utils.clip_grad_norm_(model.parameters(), optimization.clip_norm)
            adamw.step()
            adamw.zero_grad()
            balancer.step(optimization.balance * scale)
            step += 1
            tokens += pack.layout.num_tokens
            seconds = time.perf_counter() - start
            nats = loss.item()
            yield Step(
                step=step,
                tokens=tokens,
                seconds=seconds,
                loss=nats,
                bits_per_byte=nats / math.log(2) / bytes_per_token,
                learning_rate=optimization.learning_rate * scale,
                gradient_norm=norm.item(),
            )


class Balancer:
    """Keeps experts in use without a loss of its own: the bias that each router adds to its scores
    when it chooses, and nowhere else, moves by a fixed step against the load it saw."""

    def __init__(self, model: NemotronV3ForCausalLM):
        blocks = [block for block in model.model.layers if block.block_type == "moe"]
        self._hooks = [block.mixer.gate.register_forward_hook(self._see) for block in blocks]
        self._loads: dict[nn.Module, Tensor] = {}

    def _see(self, router: nn.Module, _: object, chosen: tuple[Tensor, Tensor]) -> None:
        _, experts = chosen
        count = len(router.e_score_correction_bias)
        self._loads[router] = torch.bincount(experts.flatten(), minlength=count).float()

    @torch.no_grad()
    def step(self, size: float) -> None:
        """Move the biases by `size` against the loads of the last forward pass."""
        for router, load in self._loads.items():
            router.e_score_correction_bias += size * torch.sign(load.mean() - load)
        self._loads.clear()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        for hook in self._hooks:
            hook.remove()


@torch.inference_mode()
def total_loss(model: NemotronV3ForCausalLM, packs: Iterable[Pack]) -> float:
    """The nats of all predicted tokens of the packs together."""
    model.eval()
    nats = 0.0
    for pack in packs:
        loss = model(input_ids=pack.input_ids, labels=pack.input_ids, layout=pack.layout).loss
        nats += loss.item() * pack.num_targets
    return nats


@contextmanager
def deferred_interrupt() -> Iterator[Callable[[], bool]]:
    """Within it, the first Ctrl-C is only noted, for a step to finish; a second one interrupts.

    Gives the function that says whether there was one.
    """
    noted = threading.Event()
    if threading.current_thread() is not threading.main_thread():
        yield noted.is_set  # signals are the main thread's; there is nothing to defer here
        return

    def note(number: int, frame: object) -> None:
        noted.set()
        signal.signal(signal.SIGINT, before)

    before = signal.signal(signal.SIGINT, note)
    try:
        yield noted.is_set
    finally:
        signal.signal(signal.SIGINT, before)
