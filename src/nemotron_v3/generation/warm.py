"""Kernels of generation, compiled before they are needed.

Letters: T packed tokens, D hidden size.
"""

import time
from collections.abc import Sequence
from functools import partial

import torch

from nemotron_v3.cache import NemotronHybridCache
from nemotron_v3.generation.choice import Asked
from nemotron_v3.generation.graphs import why_not
from nemotron_v3.generation.graphs.compile import Call, at_once, distinct
from nemotron_v3.generation.graphs.graph import capacity_of, graphs_of, row_slots
from nemotron_v3.generation.graphs.plan import Plan
from nemotron_v3.generation.graphs.slots import Slots
from nemotron_v3.generation.options import GenerationOptions
from nemotron_v3.layout import SequenceLayout
from nemotron_v3.layout.modes import outside_inference_mode
from nemotron_v3.model.protocol import CausalLM

LENGTHS = (2048, 512, 16)  # of prompts, a few of whose kernels differ


@outside_inference_mode
@torch.no_grad()
def warm(
    model: CausalLM,
    rows: Sequence[int] = (1,),
    *,
    length: int = 1024,
    threads: int | None = None,
    **options: object,
) -> float:
    """Compile what `generate` will launch on a GPU, in parallel, and capture its steps.

    Compiled kernels stay in Triton's cache on disk, where later processes find them; the captured
    steps stay with the model. Nothing of the model changes.

    Args:
        model: on an NVIDIA GPU.
        rows: numbers of rows to come.
        length: tokens that a row may get to, its prompt included.
        threads: that compile; the processor's cores by default, 16 at most.
        **options: those of `generate` that say how tokens are chosen.

    Returns:
        Seconds that it took.

    Raises:
        ValueError: a model whose steps no graph can hold, and why; no rows; options out of range.
    """
    began = time.perf_counter()
    if (reason := why_not(model)) is not None:
        raise ValueError(f"there is nothing to compile for a graph: {reason}")
    if not rows or min(rows) < 1:
        raise ValueError(f"rows={list(rows)} must be one or more numbers of at least 1")
    asked = Asked.of(GenerationOptions.of(options, model.generation_config))
    caches = [_cache(model, count) for count in sorted({row_slots(count) for count in rows})]
    sizes = [(cache, cache.batch_size, capacity_of(length)) for cache in caches]
    plans = [Plan(model, Slots(*size), asked) for size in sizes]
    calls = [call for plan in plans for call in distinct(plan.every_call)]
    device = model.model.embeddings.weight.device
    at_once([*prefills(model, LENGTHS[0]), *calls], device, threads)
    for tokens in LENGTHS[1:]:  # behind the first, since most kernels are the same
        at_once(prefills(model, tokens), device, threads)
    del plans, calls  # a graph makes its own
    for cache in caches:
        graphs_of(model).take(model, cache, length, asked).busy = False
    return time.perf_counter() - began


def _cache(model: CausalLM, rows: int) -> NemotronHybridCache:
    weight = model.model.embeddings.weight
    return NemotronHybridCache(model.config, rows, weight.dtype, weight.device)


def prefills(model: CausalLM, tokens: int) -> list[Call]:
    """A prompt through one block of each kind, behind caches of their own."""
    blocks = {block.block_type: block for block in reversed(list(model.model.layers))}
    weight = model.model.embeddings.weight
    layout = SequenceLayout.from_lengths([tokens], weight.device)
    stream = weight.new_zeros(tokens, weight.shape[1])
    return [
        partial(block, stream, past_key_values=_cache(model, 1), layout=layout)
        for block in blocks.values()
    ]
