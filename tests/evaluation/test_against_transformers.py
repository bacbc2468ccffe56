"""Scores against a plain loop over transformers' model."""

import math

import pytest
import torch

from nemotron_v3.evaluation.streaming import Scorer
from nemotron_v3.evaluation.tally import Partial
from tests.hf.models import ours_of, tokens, transformers_model


def plain(model, ids: torch.Tensor) -> float:
    """Minus the log-probability of a document, from all its logits at once."""
    with torch.no_grad():
        logits = model(ids[None]).logits[0, :-1].double()
    return -float(logits.log_softmax(-1).gather(1, ids[1:, None]).sum())


@pytest.mark.parametrize("window", [16, 64])
def test_perplexity_is_that_of_a_plain_loop(window):
    theirs = transformers_model()
    ours = ours_of(theirs).eval()
    documents = [tokens(n, seed=n) for n in (50, 9, 30)]
    scorer, nats = Scorer(ours, window), []
    for document in documents:
        part, cache = Partial(), scorer.new_cache(len(document))

        def read(start, count, document=document):
            return document[start : start + count]

        while (found := scorer.step(read, len(document), cache)) is not None:
            part.add(found)
        nats.append(part.nats)
    expected = [plain(theirs, document) for document in documents]
    assert nats == pytest.approx(expected, rel=1e-6)
    count = sum(len(document) - 1 for document in documents)
    assert math.exp(sum(nats) / count) == pytest.approx(math.exp(sum(expected) / count), rel=1e-6)
