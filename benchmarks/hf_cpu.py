"""An accelerated transformers model beside the plain one: training on a CPU, in fp32.

The plain model runs with its default settings and with its fastest ones; all have the same weights,
and their losses are compared before anything is timed. A pack is what the plain model cannot take:
it gets the same documents padded.
"""

from collections.abc import Iterator
from functools import partial
from typing import Any

import torch
import transformers
from torch import Tensor, nn
from transformers import NemotronHConfig, NemotronHForCausalLM

from benchmarks.cpu import SIZES, timed
from benchmarks.measure import peak_memory
from benchmarks.table import Row
from nemotron_v3.hf import accelerate

transformers.logging.set_verbosity_error()

CLOSE = 1e-4
BEST = {"attn_implementation": "sdpa", "experts_implementation": "grouped_mm"}
LENGTHS = (512, 300, 180, 90)
LONGEST = 4096
Batch = dict[str, Tensor]


def rows() -> Iterator[Row]:
    """Every row of the table; AssertionError where the losses differ."""
    name = f"transformers {transformers.__version__}"
    models = {
        "ours": accelerate(_plain()),
        f"{name}, defaults": _plain(),
        f"{name}, {', '.join(BEST.values())}": _plain(**BEST),
    }
    for what, tokens, ours, theirs in _batches():
        batches = {who: ours if who == "ours" else theirs for who in models}
        losses = [_step(models[who], batch) for who, batch in batches.items()]
        worst = max(abs(loss / losses[0] - 1) for loss in losses)
        assert worst < CLOSE, f"{what}: the losses differ: {losses}"
        runs = {who: partial(_step, models[who], batch) for who, batch in batches.items()}
        yield from timed("training step", what, tokens, runs)
    function = f"{__name__}:two_steps"
    ours, theirs = (peak_memory(function, who, LONGEST) for who in ("ours", "theirs"))
    shape = f"1 x {LONGEST}"
    peers = {f"{name}, defaults": theirs}
    yield Row("training, peak memory", shape, "GiB", ours, peers, more_is_better=False)


def two_steps(who: str, tokens: int) -> None:
    """What a process is watched at for its peak memory."""
    model = accelerate(_plain()) if who == "ours" else _plain()
    for _ in range(2):
        _step(model, _labelled(_ids(1, tokens)))


def _plain(**settings: str) -> nn.Module:
    # Its steps are clamped at time_step_min, ours at time_step_limit, as the checkpoints say.
    config = NemotronHConfig(**SIZES, time_step_min=1e-9, use_cache=False)
    torch.manual_seed(0)
    return NemotronHForCausalLM._from_config(config, dtype=torch.float32, **settings).train()


def _batches() -> Iterator[tuple[str, int, Batch, Batch]]:
    """What it is, its real tokens, the batch for ours and for the plain model."""
    for S in (1024, 2048, LONGEST):
        batch = _labelled(_ids(1, S))
        yield f"1 x {S}", S, batch, batch
    real = sum(LENGTHS)
    mask = (torch.arange(max(LENGTHS)) < torch.tensor(LENGTHS)[:, None]).long()
    ids = _ids(len(LENGTHS), max(LENGTHS))
    padded = _labelled(ids, ids.masked_fill(mask == 0, -100)) | {"attention_mask": mask}
    yield f"padded, {list(LENGTHS)}", real, padded, padded
    positions = torch.cat([torch.arange(n) for n in LENGTHS])[None]
    packed = _labelled(ids[mask == 1][None]) | {"position_ids": positions}
    yield f"packed, {list(LENGTHS)}", real, packed, padded


def _ids(*shape: int) -> Tensor:
    return torch.randint(SIZES["vocab_size"], shape, generator=torch.Generator().manual_seed(0))


def _labelled(ids: Tensor, labels: Tensor | None = None) -> Batch:
    return {"input_ids": ids, "labels": ids if labels is None else labels}


def _step(model: nn.Module, batch: Any) -> float:
    model.zero_grad(set_to_none=True)
    loss = model(**batch).loss
    loss.backward()
    return loss.item()
