"""The loss over a vocabulary of 131 072 on a GPU in bf16, beside the logits held at once.

Letters: T tokens, D width, V vocabulary. The floor is the three products alone (logits, gradient of
the hidden states, gradient of the weight), each whole, in the same minute. Times are CUDA events
around calls of tens of milliseconds, medians, the variants taking turns; the host has queued a call
before the GPU begins it, as in a training step. Answers are checked against fp32 first.
"""

import gc
import statistics
from collections.abc import Callable, Iterator
from functools import partial
from importlib import import_module
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from benchmarks.table import OOM, Row
from nemotron_v3 import ops

D, V = 2688, 131072  # Nemotron-3 Nano
TOKENS = (8192, 32768)
REPEATS = 5
AHEAD = 4_000_000  # cycles of the GPU, some 2 ms, in which the host queues a call
Step = Callable[[], Any]
Loss = Callable[..., Tensor]


def rows() -> Iterator[Row]:
    """Every row of the table; raises first if a result is wrong."""
    _check()
    for T in TOKENS:
        yield from _measured(T)
        gc.collect()
        torch.cuda.empty_cache()


def _measured(T: int) -> Iterator[Row]:
    hidden, weight, targets = _drawn(T, D, V)
    each: dict[str, Loss] = {"ours": ops.linear_cross_entropy}
    each |= {"torch, all logits": _torch, "ours, all logits": _all_logits} | _peers()
    steps: dict[str, Step] = {
        name: partial(_step, loss, hidden, weight, targets) for name, loss in each.items()
    }
    steps["bare"] = _bare(hidden.detach(), weight.detach())
    times = _times(steps)
    floor = times.pop("bare")
    shape = f"{T} x {D} x {V}"
    memory = {name: _memory(step, weight) for name, step in steps.items() if name != "bare"}
    options = {"more_is_better": False}
    yield Row(
        "loss, forward + backward", shape, "ms", times.pop("ours"), times, floor=floor, **options
    )
    ours = memory.pop("ours")
    yield Row("loss, memory beyond dW", shape, "GiB", ours, memory, **options)

    def forward(loss: Loss) -> Tensor:
        with torch.no_grad():
            return loss(hidden, weight, targets)

    times = _times({name: partial(forward, loss) for name, loss in each.items()})
    yield Row("loss, forward", shape, "ms", times.pop("ours"), times, **options)


def _drawn(T: int, width: int, vocabulary: int) -> tuple[Tensor, Tensor, Tensor]:
    generator = torch.Generator("cuda").manual_seed(0)

    def normal(*shape: int, scale: float) -> Tensor:
        x = torch.randn(*shape, device="cuda", generator=generator, dtype=torch.bfloat16)
        return x.mul_(scale).requires_grad_()

    targets = torch.randint(vocabulary, (T,), device="cuda", generator=generator)
    targets[::10] = -100
    return normal(T, width, scale=1.0), normal(vocabulary, width, scale=2 * width**-0.5), targets


def _torch(hidden: Tensor, weight: Tensor, targets: Tensor) -> Tensor:
    return F.cross_entropy(F.linear(hidden, weight).float(), targets)


def _all_logits(hidden: Tensor, weight: Tensor, targets: Tensor) -> Tensor:
    return ops.cross_entropy(F.linear(hidden, weight), targets)


def _peers() -> dict[str, Loss]:
    """The losses of other projects that are installed."""
    found = {}
    for name in ("liger_peer", "cce_peer"):
        try:
            peer = import_module(f"benchmarks.peers.{name}")
        except ImportError:
            continue
        found[peer.NAME] = peer.linear_cross_entropy
    return found


def _step(loss: Loss, hidden: Tensor, weight: Tensor, targets: Tensor) -> tuple[Tensor, ...]:
    value = loss(hidden, weight, targets)
    return value.detach(), *torch.autograd.grad(value, (hidden, weight))


def _bare(hidden: Tensor, weight: Tensor) -> Step:
    """The three products, of at most 8192 tokens at once: their operands fit beside the rest."""
    parts = hidden.split(8192)

    def products() -> None:
        for part in parts:
            logits = part @ weight.t()
            logits @ weight
            logits.t() @ part

    return products


def _times(steps: dict[str, Step]) -> dict[str, float | str]:
    """Milliseconds, or OOM."""
    taken: dict[str, list[float]] = {}
    for turn in range(REPEATS + 1):
        for name, step in steps.items():
            start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
            try:
                torch.cuda._sleep(AHEAD)
                start.record()
                step()
                end.record()
            except torch.OutOfMemoryError:
                taken.pop(name, None)
                torch.cuda.empty_cache()
                continue
            torch.cuda.synchronize()
            if turn:
                taken.setdefault(name, []).append(start.elapsed_time(end))
    return {name: statistics.median(taken[name]) if name in taken else OOM for name in steps}


def _memory(step: Step, weight: Tensor) -> float | str:
    """GiB at the peak of a step beyond what was there and the gradient of the weight."""
    gc.collect()
    torch.cuda.synchronize()
    torch.cuda.reset_peak_memory_stats()
    before = torch.cuda.memory_allocated()
    try:
        step()
    except torch.OutOfMemoryError:
        return OOM
    torch.cuda.synchronize()
    return (torch.cuda.max_memory_allocated() - before - weight.nbytes) / 2**30


def _check() -> None:
    """Ours against the same in fp32, all logits at once; raises where they differ."""
    given = _drawn(1024, 256, 32768)
    exact = [t.detach().float().requires_grad_() for t in given[:2]]
    ours = _step(ops.linear_cross_entropy, *given)
    true = _step(_torch, *exact, given[2])
    for name, a, b in zip(("the loss", "dhidden", "dweight"), ours, true, strict=True):
        error = float((a.double() - b.double()).norm() / b.double().norm())
        if not error < 1e-2:
            raise AssertionError(f"{name} is off by {error:.1e}: nothing is timed")
