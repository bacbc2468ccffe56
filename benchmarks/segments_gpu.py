"""Sequences in segments in time on a GPU: 7 blocks of Nano's width, bf16, one document.

The gradients come first: those of the segments and those of the whole sequence, both beside the
whole in fp32 with the same experts chosen. Then time and memory beside checkpointing of every
block, then a million tokens. Without a GPU the suite runs with small sizes, to see that it works.
"""

import copy
import gc
import statistics
import time
from collections.abc import Callable, Iterator

import torch
from torch import Tensor, nn

from benchmarks.hf_gpu import PATTERN, sizes
from benchmarks.table import OOM, Row, unavailable
from nemotron_v3 import NemotronV3Config, NemotronV3ForCausalLM
from nemotron_v3.layers.moe.routing_replay import RoutingRecord, record_routing, replay_routing
from nemotron_v3.model.segmented import segmented

ON_GPU = torch.cuda.is_available()
DEVICE = "cuda" if ON_GPU else "cpu"
TOKENS = 65536 if ON_GPU else 256
SIZES = (8192, 16384, 32768) if ON_GPU else (32, 64)
LONGEST = (1048576, 65536) if ON_GPU else (512, 128)  # tokens, and tokens a segment
REPEATS = 3
GIB = 2**30
ULP = torch.finfo(torch.bfloat16).eps
PEER = "checkpointing"

Gradients = dict[str, Tensor]


def rows() -> Iterator[Row]:
    torch.manual_seed(0)
    with torch.device(DEVICE):
        config = NemotronV3Config(**sizes(), dtype=torch.bfloat16)
        model = NemotronV3ForCausalLM(config).train()
    ids = torch.randint(config.vocab_size, (TOKENS,), device=DEVICE)
    share, name = worst_gradient(model, ids, SIZES[0])
    shape = f"{PATTERN}, 1 x {TOKENS} in segments of {SIZES[0]}: {name}"
    yield Row("largest error of a gradient", shape, "of the rule", share, more_is_better=False)
    assert share <= 1, f"the gradient of {name} is wrong: {share} of what the rule allows"
    yield from _times(model, ids)
    yield from _longest(model)


def worst_gradient(model: NemotronV3ForCausalLM, ids: Tensor, size: int) -> tuple[float, str]:
    """The largest error of a gradient of segments, over twice the whole's own and an ulp."""
    with record_routing(model) as record:
        whole = _gradients(model, lambda: _whole(model, ids))
    with replay_routing(model, _in_segments(record, size)):
        parts = _gradients(model, lambda: segmented(model, size).backward(ids, labels=ids))
    wide = copy.deepcopy(model).float().train()
    with replay_routing(wide, record):
        truth = _gradients(wide, lambda: _whole(wide, ids))
    shares = {
        name: _error(parts[name], true) / (2 * _error(whole[name], true) + ULP)
        for name, true in truth.items()
    }
    worst = max(shares, key=shares.__getitem__)
    return shares[worst], worst


def _whole(model: NemotronV3ForCausalLM, ids: Tensor) -> Tensor:
    """A step with every block recomputed."""
    model.gradient_checkpointing_enable()
    try:
        loss = model(ids, labels=ids).loss
        loss.backward()
    finally:
        model.gradient_checkpointing_disable()
    return loss.detach()


def _gradients(model: nn.Module, step: Callable[[], Tensor]) -> Gradients:
    """On the host, so that two sets of them need no room on the GPU."""
    model.zero_grad(set_to_none=True)
    step()
    found = {n: p.grad.cpu() for n, p in model.named_parameters() if p.grad is not None}
    model.zero_grad(set_to_none=True)
    return found


def _in_segments(record: RoutingRecord, size: int) -> dict[str, list[Tensor]]:
    """The experts that each call of a router chose, as the calls of segments."""
    return {
        name: [part for call in calls for part in call.split(size)]
        for name, calls in record.indices.items()
    }


def _error(found: Tensor, true: Tensor) -> float:
    found, true = (t.to(DEVICE).float() for t in (found, true))
    return float((found - true).norm() / true.norm())


def _times(model: NemotronV3ForCausalLM, ids: Tensor) -> Iterator[Row]:
    ways: dict[str, Callable[[], Tensor]] = {PEER: lambda: _whole(model, ids)}
    for size in SIZES:
        step = segmented(model, size).backward
        ways[f"segments of {size}"] = lambda step=step: step(ids, labels=ids)
    on_host = segmented(model, SIZES[1], states="host").backward
    ways[f"segments of {SIZES[1]}, states on the host"] = lambda: on_host(ids, labels=ids)
    peaks = {name: _measure(model, way)[1] for name, way in ways.items()}
    taken: dict[str, list[float | str]] = {name: [] for name in ways}
    for _ in range(REPEATS):  # in turns: a GPU's clock drifts
        for name, way in ways.items():
            taken[name].append(_measure(model, way)[0])
    shape = f"{PATTERN}, 1 x {TOKENS}, bf16"
    ms = {name: _median(times) for name, times in taken.items()}
    for name in list(ways)[1:]:
        values = {PEER: ms[PEER]}
        yield Row(f"step, {name}", shape, "ms", ms[name], values, more_is_better=False)
        values = {PEER: peaks[PEER]}
        yield Row(f"peak, {name}", shape, "GiB", peaks[name], values, more_is_better=False)


def _longest(model: NemotronV3ForCausalLM) -> Iterator[Row]:
    tokens, size = LONGEST
    ids = torch.randint(model.config.vocab_size, (tokens,), device=DEVICE)
    step = segmented(model, size, states="host").backward
    ms, peak = _measure(model, lambda: step(ids, labels=ids))
    shape = f"{PATTERN}, 1 x {tokens} in segments of {size}, bf16"
    yield Row("step, states on the host", shape, "ms", ms, more_is_better=False)
    yield Row("peak, states on the host", shape, "GiB", peak, more_is_better=False)


def _measure(model: nn.Module, step: Callable[[], Tensor]) -> tuple[float | str, float | str]:
    """Milliseconds by the host's clock, and the most GiB that PyTorch had allocated."""
    model.zero_grad(set_to_none=True)
    gc.collect()
    if ON_GPU:
        torch.cuda.empty_cache()
        torch.cuda.reset_peak_memory_stats()
    start = time.perf_counter()
    try:
        loss = float(step())
    except torch.OutOfMemoryError:
        return OOM, OOM
    finally:
        model.zero_grad(set_to_none=True)
    assert 0 < loss < 20, f"the loss is {loss}"
    milliseconds = (time.perf_counter() - start) * 1e3
    if not ON_GPU:
        return milliseconds, unavailable("no GPU")
    return milliseconds, torch.cuda.max_memory_allocated() / GIB


def _median(times: list[float | str]) -> float | str:
    numbers = [t for t in times if not isinstance(t, str)]
    return statistics.median(numbers) if len(numbers) == len(times) else OOM
