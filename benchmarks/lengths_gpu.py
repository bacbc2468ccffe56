"""Training and prefill on a GPU where every step brings other lengths: 7 blocks of Nano's width.

Beside each row stands the time of one document of as many real tokens whose length repeats,
interpolated between those that are measured. A step is timed by the host's clock up to its end on
the device. A pack's loss is held to that of its documents alone first.
"""

import gc
import random
import statistics
import time
from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import Tensor, nn

from benchmarks.hf_gpu import PATTERN, VARIANTS, sizes
from benchmarks.lengths import Draw, documents, one, same
from benchmarks.lengths import rows as padded_rows
from benchmarks.table import Row
from nemotron_v3 import NemotronHybridCache, NemotronV3Config, NemotronV3ForCausalLM
from nemotron_v3.layout import SequenceLayout

STEPS = 21  # the first is left out
SETTLED = 10  # steps after which nothing may be much slower than the median
KNOWN = (4096, 6144, 8192)
PEER = "one length"
DRAWN: dict[str, Draw] = {
    "64 documents, 8192": documents(8192, 64),
    "4 documents, 8192": documents(8192, 4),
    "padded 8 x 1024": padded_rows(8, 1024, 4600),
    "1 document, 4096-8192": one(4096, 8192),
}
PROMPTS = (500, 1000, 1500)
CLOSE = 1e-2  # of the loss in bf16


def rows() -> Iterator[Row]:
    losses = {}
    for name, make in {"native": _native, "accelerated": VARIANTS["linear loss"]}.items():
        model = make()
        losses[name] = _loss(model)
        yield from _training(name, model)
        if name == "native":
            yield from _prefill(model.eval())
        del model
        gc.collect()
        torch.cuda.empty_cache()
    assert all(0 < loss < 20 for loss in losses.values()), f"losses: {losses}"


def _native() -> NemotronV3ForCausalLM:
    torch.manual_seed(0)
    with torch.device("cuda"):
        return NemotronV3ForCausalLM(NemotronV3Config(**sizes(), dtype=torch.bfloat16)).train()


def _loss(model: nn.Module) -> float:
    """Of a pack; AssertionError unless that of its documents alone is the same."""
    lengths = documents(2048, 5)(random.Random(1))
    batch = _batch(model, lengths)
    with torch.no_grad():
        whole = float(model(**batch).loss)
        parts = batch["input_ids"].flatten().split(lengths)
        losses = [float(model(input_ids=p[None], labels=p[None]).loss) for p in parts]
    weights = [max(len(p) - 1, 0) for p in parts]
    alone = sum(x * w for x, w in zip(losses, weights, strict=True) if w) / sum(weights)
    assert abs(whole - alone) < CLOSE * alone, f"packed {whole}, alone {alone}"
    return whole


def _batch(model: nn.Module, lengths: list[int], padded: bool = False) -> dict[str, Any]:
    """Fresh tokens of these lengths, as the model takes them."""
    vocabulary = model.config.vocab_size
    if padded:
        ids = torch.randint(vocabulary, (len(lengths), max(lengths)), device="cuda")
        columns = torch.arange(max(lengths), device="cuda")
        mask = (columns < torch.tensor(lengths, device="cuda")[:, None]).long()
        labels = ids.masked_fill(mask == 0, -100)
        return {"input_ids": ids, "labels": labels, "attention_mask": mask}
    ids = torch.randint(vocabulary, (sum(lengths),), device="cuda")
    if isinstance(model, NemotronV3ForCausalLM):
        layout = SequenceLayout.from_lengths(lengths, "cuda")
        return {"input_ids": ids, "labels": ids, "layout": layout}
    positions = torch.cat([torch.arange(n) for n in lengths])[None].to("cuda")
    return {"input_ids": ids[None], "labels": ids[None], "position_ids": positions}


def _step(model: nn.Module, batch: dict[str, Any]) -> Tensor:
    model.zero_grad(set_to_none=True)
    loss = model(**batch).loss
    loss.backward()
    return loss.detach()


def _times(
    draw: Draw, run: Callable[[list[int]], Any], seed: int = 0
) -> tuple[list[float], list[int]]:
    """Milliseconds of each step but the first, and its tokens."""
    source, times, tokens = random.Random(seed), [], []
    for _ in range(STEPS):
        lengths = draw(source)
        torch.cuda.synchronize()
        start = time.perf_counter()
        run(lengths)
        torch.cuda.synchronize()
        times.append((time.perf_counter() - start) * 1e3)
        tokens.append(sum(lengths))
    return times[1:], tokens[1:]


def _between(known: dict[int, float], tokens: int) -> float:
    """The time for `tokens`, on the straight line between the nearest two that are known."""
    measured = sorted(known)
    low = max((n for n in measured[:-1] if n <= tokens), default=measured[0])
    high = measured[measured.index(low) + 1]
    return known[low] + (known[high] - known[low]) * (tokens - low) / (high - low)


def _rows(
    work: str, drawn: dict[str, Draw], known: tuple[int, ...], run: Any, seed: int = 0
) -> Iterator[Row]:
    repeated = {n: statistics.median(_times(same(n), run("one"))[0]) for n in known}
    for n, milliseconds in repeated.items():
        yield Row(f"{work}, one length", str(n), "ms", milliseconds, more_is_better=False)
    for name, draw in drawn.items():
        times, tokens = _times(draw, run(name), seed)
        beside = {PEER: statistics.median(_between(repeated, n) for n in tokens)}
        ours = statistics.median(times)
        yield Row(f"{work}, new lengths", name, "ms", ours, beside, more_is_better=False)
        worst = max(times[SETTLED:])
        yield Row(f"{work}, worst after {SETTLED}", name, "ms", worst, {}, more_is_better=False)


def _training(name: str, model: nn.Module) -> Iterator[Row]:
    def run(kind: str) -> Callable[[list[int]], Tensor]:
        return lambda lengths: _step(model, _batch(model, lengths, kind.startswith("padded")))

    yield from _rows(f"{PATTERN} {name}, step", DRAWN, KNOWN, run)


def _prefill(model: NemotronV3ForCausalLM) -> Iterator[Row]:
    @torch.no_grad()
    def fill(lengths: list[int]) -> None:
        ids = torch.randint(model.config.vocab_size, (1, lengths[0]), device="cuda")
        cache = NemotronHybridCache(model.config, 1, dtype=torch.bfloat16, device="cuda")
        model(input_ids=ids, past_key_values=cache, logits_to_keep=1)

    # cuBLAS loads a kernel when a product's size first asks for it: twice, so that both are seen.
    for seed, turn in enumerate(("first 20", "next 20")):
        drawn = {f"500-1500, {turn}": one(500, 1500)}
        yield from _rows(f"{PATTERN}, prefill", drawn, PROMPTS, lambda kind: fill, seed)
