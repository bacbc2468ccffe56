"""The cache's property tests on a GPU, with generations by a CUDA graph among the operations."""

import random

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from nemotron_v3.generation.graphs.graph import graphs_of
from tests.cache import test_decode, test_operations
from tests.models import tiny_model, tokens

pytestmark = [
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU"),
    pytest.mark.heavy,
]
NEW = 3  # tokens of a generation
SEEDS = st.integers(0, 2**32)
KINDS = st.lists(st.sampled_from([*test_operations.KINDS, "generate", "generate"]), max_size=8)


@pytest.fixture
def on_gpu(monkeypatch):
    """New tensors, and the model of the operations, are on the GPU."""
    model = tiny_model("M*-M", chunk_size=8).eval().requires_grad_(False).cuda()
    monkeypatch.setattr(test_operations, "MODEL", model)
    with torch.device("cuda"):
        yield model
    graphs_of(model).clear()


def generated(shadow: test_operations.Shadow, model, rng: random.Random) -> None:
    """Each row gets a prompt of one to three tokens more, and the tokens that follow it."""
    rows = [[*row, *(rng.randrange(97) for _ in range(rng.randint(1, 3)))] for row in shadow.rows]
    out = model.generate(
        rows,
        past_key_values=shadow.cache,
        max_new_tokens=NEW,
        eos_token_id=[rng.randrange(97)],
    )
    new = [row[:length].tolist() for row, length in zip(out.sequences, out.lengths, strict=True)]
    shadow.rows = [row[:-1] for row in new]  # the last one is not fed


@settings(max_examples=40, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(KINDS, st.integers(1, 3), SEEDS)
def test_random_sequences_of_operations(on_gpu, tmp_path_factory, kinds, rows, seed):
    rng, shadow = random.Random(seed), test_operations.Shadow.fresh(rows)
    shadow.feed([rng.randint(1, 12) for _ in range(rows)], rng)
    for kind in kinds:
        if kind == "generate":
            generated(shadow, on_gpu, rng)
        else:
            path = tmp_path_factory.mktemp("cache")
            shadow = test_operations.act(shadow, kind, rng, path)
    shadow.check()


@settings(max_examples=20, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(st.lists(st.integers(1, 20), min_size=1, max_size=6), st.integers(0, 3))
def test_drawn_pieces_with_and_without_a_rollback_window(on_gpu, pieces, window):
    ids = tokens(1, sum(pieces)).cuda()
    measured = test_decode.in_pieces(on_gpu, ids, pieces, rollback_window=window)
    with torch.no_grad():
        test_decode.assert_near(measured, on_gpu(ids).logits)
