"""Prompts that processes read together, and what is generated from there."""

from typing import Any

import pytest
import torch
import torch.distributed as dist

from nemotron_v3 import NemotronHybridCache, SequenceLayout
from nemotron_v3.parallel import Plan, parallelize
from nemotron_v3.parallel.agreement import Disagreement
from nemotron_v3.parallel.context import context_parallel
from tests.models import tiny_model, tokens
from tests.parallel.shared_tokens import cases, close

PATTERN = "ME*-M*"


def prompts(rank: int) -> None:
    """The cache of one process: every state, and of the ranks that ask alone."""
    torch.set_default_dtype(torch.float64)
    model = tiny_model(PATTERN).double().eval()
    for lengths, order in cases():
        layout = SequenceLayout.from_lengths(lengths)
        ids = tokens(layout.num_tokens)
        alone, shared = (_cache(model, len(lengths)) for _ in range(2))
        with torch.no_grad():
            model(ids, layout=layout, past_key_values=alone)
        asks = rank != 1  # the first one and, of four, others too
        context_parallel(model, layout=order).prefill(
            ids, layout=layout, cache=shared if asks else None
        )
        if not asks:
            assert not any(shared.lengths)
            continue
        assert shared.lengths == alone.lengths == tuple(lengths)
        longest = max(lengths)
        for layer, state in alone.states.items():
            for name, wanted in state.held(longest).tensors().items():
                found = getattr(shared.states[layer].held(longest), name)
                close(found, wanted, f"{lengths} {order}: {name} of layer {layer}")


def generated(rank: int) -> None:
    """The tokens of one process: from a copy of the model, and from one that is spread."""
    torch.set_default_dtype(torch.float32)
    prompt, told = tokens(2, 31), {"max_new_tokens": 9, "graph": False}
    wanted = tiny_model(PATTERN).eval().generate(prompt, **told)
    model = tiny_model(PATTERN).eval()
    cache = _cache(model, 2) if rank == 0 else None
    context_parallel(model).prefill(prompt[:, :-1], cache=cache)
    if cache is not None:
        found = model.generate(prompt, past_key_values=cache, **told)
        assert torch.equal(found.sequences, wanted.sequences)
    spread = parallelize(tiny_model(PATTERN).eval(), Plan(cp=dist.get_world_size(), ep=2))
    cache = _cache(spread, 2)
    shared = context_parallel(spread)
    assert shared.group.size() == dist.get_world_size()
    shared.prefill(prompt[:, :-1], cache=cache)
    found = spread.generate(prompt, past_key_values=cache, **told)
    assert torch.equal(found.sequences, wanted.sequences)


def unfit(rank: int) -> None:
    """A cache that does not fit one process, and prompts that differ: all processes say so."""
    model = tiny_model(PATTERN).eval()
    shared, ids = context_parallel(model), tokens(12)
    full = _cache(model, 1)
    with torch.no_grad():
        model(ids, past_key_values=full)
    window: Any = NemotronHybridCache(model.config, 1, torch.float32, rollback_window=2)
    for wrong, message in (
        (full, r"rank 0: the cache holds \(12,\) tokens"),
        (window, "rank 0: the cache's rollback_window is 2"),
        (_cache(model, 3), "rank 0: .*3 rows"),
    ):
        with pytest.raises(Disagreement, match=message):
            shared.prefill(ids, cache=None if rank else wrong)
    with pytest.raises(Disagreement, match="rank 1 has the tokens"):
        shared.prefill(tokens(12, seed=int(rank == 1)), cache=None)


def _cache(model: Any, rows: int) -> NemotronHybridCache:
    return NemotronHybridCache(model.config, rows, model.model.embeddings.weight.dtype)
