"""`train` on a GPU: its loop beside a bare step, and LoRA of the whole Nano-30B.

Weights and tokens are drawn; every step brings other documents, packed without padding. The time
of a step is the host's between the ends of two steps, the device's work included. Without a GPU
the suite runs with small sizes, to see that it works.
"""

import gc
import random
import statistics
import tempfile
import time
from collections.abc import Callable, Iterator
from contextlib import suppress
from dataclasses import replace
from itertools import pairwise
from pathlib import Path
from typing import Any

import torch

from benchmarks.hf_gpu import PATTERN, TINY
from benchmarks.lengths import documents
from benchmarks.table import Row
from nemotron_v3 import NemotronV3Config, NemotronV3ForCausalLM
from nemotron_v3.data.options import DataOptions, Source
from nemotron_v3.data.pieces import PackedRow
from nemotron_v3.data.report import DataReport
from nemotron_v3.hf import lora
from nemotron_v3.train.batches import make_batches
from nemotron_v3.train.loop import Step
from nemotron_v3.train.optimizer import make_optimizer
from nemotron_v3.train.options import (
    LogOptions,
    LoraOptions,
    MemoryOptions,
    ModelOptions,
    OptimizerOptions,
    SaveOptions,
    ScheduleOptions,
    TrainOptions,
)
from nemotron_v3.train.run import train

ON_GPU = torch.cuda.is_available()
DEVICE = torch.device("cuda", 0) if ON_GPU else torch.device("cpu")
NANO = "nemotron-3-nano-30b"
TOKENS = 8192 if ON_GPU else 64
DOCUMENTS = 8
WARM, STEPS = (6, 24) if ON_GPU else (1, 2)
TURNS = 3 if ON_GPU else 1
GIB = 2**30
LIMIT_GIB = 78  # of LoRA: what "auto" may plan for
GROUPS = ("attention", "mamba", "shared", "routed")


def rows() -> Iterator[Row]:
    yield from _loop()
    yield from _lora()


class DrawnRows:
    """A row of new tokens in new documents for every step: data as `train` takes them."""

    def __init__(self, options: DataOptions, tokenizer: Any, rank: int, processes: int):
        self.step = 0
        self.vocabulary: int = 131072 if ON_GPU else TINY["vocab_size"]
        self.largest_token: int = self.vocabulary - 1
        self.draw = documents(TOKENS, DOCUMENTS)

    def __iter__(self) -> Iterator[list[PackedRow]]:
        while True:
            self.step += 1
            generator = torch.Generator().manual_seed(self.step)
            ids = torch.randint(self.vocabulary, (TOKENS,), generator=generator)
            starts = [0]
            for length in self.draw(random.Random(self.step)):
                starts.append(starts[-1] + length)
            labels = ids.clone()
            labels[starts[:-1]] = -100
            yield [PackedRow(ids, labels, starts, [(0, 0)] * (len(starts) - 1))]

    def total_steps(self, at_most: int | None = None) -> int | None:
        return None

    def state_dict(self) -> dict[str, Any]:
        return {"step": self.step}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self.step = state["step"]

    def report(self) -> DataReport:
        return DataReport(())


class _Enough(Exception):
    """Ends a training whose checkpoint nobody wants."""


def _options(folder: Path, pattern: str, **changes: Any) -> TrainOptions:
    config: dict[str, Any] = {"layers_block_type": pattern} if pattern else {}
    if not ON_GPU:
        config = {"layers_block_type": PATTERN, **TINY}
    return TrainOptions(
        out=folder / "run",
        data=DataOptions(sources=(Source("drawn"),), tokens_per_row=TOKENS, rows=1, epochs=None),
        model=ModelOptions(preset=NANO, dtype="bfloat16", device=DEVICE.type, config=config),
        optimizer=OptimizerOptions(bf16_weights="stochastic"),
        schedule=ScheduleOptions(steps=10_000),
        save=SaveOptions(every=0),
        **changes,
    )


def _trained(pattern: str, **changes: Any) -> tuple[float, float]:
    """Milliseconds of a step, the median; and the most GiB allocated, from the warm steps on."""
    ends: list[float] = []
    losses: list[float] = []

    def note(step: Step) -> None:
        if ON_GPU and step.step == WARM:
            torch.cuda.reset_peak_memory_stats()
        ends.append(time.perf_counter())
        losses.append(step.loss)
        if step.step >= WARM + STEPS:
            raise _Enough

    with tempfile.TemporaryDirectory() as folder:
        options = _options(Path(folder), pattern, **changes)
        with suppress(_Enough):
            train(options, adapters=lora, tokenizer=object(), make_data=DrawnRows, after_step=note)
    assert all(0 < loss < 20 for loss in losses), f"losses: {losses}"
    taken = [(end - start) * 1e3 for start, end in pairwise(ends[WARM - 1 :])]
    peak = torch.cuda.max_memory_allocated() / GIB if ON_GPU else 0.0
    _free()
    return statistics.median(taken), peak


def _bare(clip: Callable[[Any], Any] | None) -> float:
    """The same steps without a loop: forward, backward, optimiser, on batches that are there."""
    with tempfile.TemporaryDirectory() as folder:
        options = _options(Path(folder), PATTERN)
    config = NemotronV3Config.preset(NANO, **options.model.config, dtype=torch.bfloat16)
    with DEVICE:
        model = NemotronV3ForCausalLM(config).train()
    optimizer = make_optimizer(model, options.optimizer, options.seed)
    data = iter(DrawnRows(options.data, None, 0, 1))
    batches = [make_batches(next(data), 1, DEVICE)[0] for _ in range(WARM + STEPS)]
    taken = []
    for batch in batches:
        start = time.perf_counter()
        model(**batch.arguments()).loss.backward()
        if clip is not None:
            clip(model.parameters())
        optimizer.step()
        optimizer.zero_grad()
        if ON_GPU:
            torch.cuda.synchronize()
        taken.append((time.perf_counter() - start) * 1e3)
    del model, optimizer
    _free()
    return statistics.median(taken[WARM:])


def _loop() -> Iterator[Row]:
    peers: dict[str, Callable[[Any], Any] | None] = {
        "bare step": None,
        "bare, clip_grad_norm_": lambda p: torch.nn.utils.clip_grad_norm_(p, 1.0),
    }
    ours: list[float] = []
    theirs: dict[str, list[float]] = {name: [] for name in peers}
    for _ in range(TURNS):  # in turns: a GPU's clock drifts
        ours.append(_trained(PATTERN)[0])
        for name, clip in peers.items():
            theirs[name].append(_bare(clip))
    beside = {name: statistics.median(times) for name, times in theirs.items()}
    shape = f"{PATTERN}, 1 x {TOKENS}, bf16, AdamW"
    milliseconds = statistics.median(ours)
    yield Row("step of train's loop", shape, "ms", milliseconds, beside, more_is_better=False)


def _lora() -> Iterator[Row]:
    adapters = LoraOptions(rank=16, groups=GROUPS)
    recomputed: dict[str, MemoryOptions] = {
        f"by memory, {LIMIT_GIB} GiB": MemoryOptions(checkpoint_every="auto", device_gib=LIMIT_GIB),
        "all blocks": MemoryOptions(checkpoint_every=1),
    }
    for name, memory in recomputed.items():
        log = replace(LogOptions(), details=10)
        milliseconds, peak = _trained("", lora=adapters, memory=memory, log=log)
        shape = f"{NANO}, rank 16, 1 x {TOKENS}, recomputed: {name}"
        yield Row("LoRA", shape, "tokens/s", TOKENS / milliseconds * 1e3)
        yield Row("LoRA, peak", shape, "GiB", peak, more_is_better=False)


def _free() -> None:
    gc.collect()
    if ON_GPU:
        torch.cuda.empty_cache()
        torch.cuda.reset_peak_memory_stats()
