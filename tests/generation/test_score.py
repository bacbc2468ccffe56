"""Scores against log-softmax of all logits at once."""

import sys

import pytest
import torch

from nemotron_v3 import SequenceLayout
from nemotron_v3.generation import score
from tests.generation.samples import padded, prompts
from tests.models import tiny_model, tokens


@pytest.fixture(scope="module")
def model():
    return tiny_model()


@pytest.fixture(autouse=True)
def slices_of_three_tokens(monkeypatch):
    # By name: the package's attribute `score` is the function.
    monkeypatch.setattr(sys.modules[score.__module__], "LOGITS_AT_ONCE", 3 * 97 + 5)


def plain(model, ids):
    """One document `[T]`: log-probability of each token but the first, which gets 0."""
    everything = model(ids[None]).logits[0].log_softmax(-1)
    following = everything[:-1].gather(1, ids[1:, None])[:, 0]
    return torch.cat([following.new_zeros(1), following])


def close(a, b):
    torch.testing.assert_close(a, b, rtol=0, atol=1e-5)


@pytest.mark.parametrize("side", ["left", "right", "mixed"])
def test_a_padded_batch(model, side):
    rows = prompts()
    ids, mask = padded(rows, side)
    scores = score(model, ids, attention_mask=mask)
    for row, document in enumerate(rows):
        close(scores[row][mask[row] == 1], plain(model, document))
        assert not scores[row][mask[row] == 0].any()


def test_a_pack_by_layout_and_by_offsets(model):
    rows = prompts()
    ids = torch.cat(rows)
    layout = SequenceLayout.from_lengths([len(row) for row in rows])
    expected = torch.cat([plain(model, row) for row in rows])
    close(score(model, ids, layout), expected)
    close(model.score(ids, cu_seqlens=layout.cu_seqlens), expected)


def test_it_is_differentiable(model):
    ids = tokens(2, 10)
    names, parameters = zip(*model.named_parameters(), strict=True)
    ours = torch.autograd.grad(score(model, ids).sum(), parameters)
    theirs = torch.autograd.grad(sum(plain(model, row).sum() for row in ids), parameters)
    for name, a, b in zip(names, ours, theirs, strict=True):
        assert (a - b).abs().max() <= 1e-5 * max(1.0, b.abs().max()), name


def test_the_logits_are_never_held_at_once(model, monkeypatch):
    seen = []
    head = model.lm_head.forward
    monkeypatch.setattr(model.lm_head, "forward", lambda x: seen.append(len(x)) or head(x))
    with torch.no_grad():
        score(model, tokens(2, 10))
    assert seen == [3, 3, 3, 3, 3, 3, 2]


def test_a_mask_that_does_not_fit_is_refused(model):
    with pytest.raises(ValueError, match=r"shape \(1, 4\)"):
        score(model, tokens(1, 3), attention_mask=torch.ones(1, 4))
