"""Scores by windows against the score of the whole."""

import math

import pytest
import torch

from nemotron_v3.evaluation.share import deal, packs
from nemotron_v3.evaluation.streaming import Scorer
from nemotron_v3.evaluation.tally import Partial
from tests.models import tiny_model, tokens

LENGTH = 41


@pytest.fixture(scope="module")
def model():
    return tiny_model().eval()


def windowed(model, ids: torch.Tensor, window: int) -> tuple[torch.Tensor, Partial]:
    """The scores of all tokens but the first, and their sums."""
    scorer, part, scores = Scorer(model, window), Partial(), []
    cache = scorer.new_cache(len(ids))

    def read(start: int, count: int) -> torch.Tensor:
        return ids[start : start + count]

    while (found := scorer.step(read, len(ids), cache)) is not None:
        assert found.start == 1 + sum(map(len, scores))
        scores.append(found.scores)
        part.add(found)
    return torch.cat(scores), part


@pytest.mark.parametrize("window", [1, 3, 16, LENGTH - 2, LENGTH - 1, LENGTH, 1000])
def test_windows_of_any_size_give_the_score_of_the_whole(model, window):
    ids = tokens(LENGTH)
    with torch.no_grad():
        whole = model.score(ids).double()[1:]
    scores, part = windowed(model, ids.int(), window)
    torch.testing.assert_close(scores, whole, rtol=0, atol=2e-5)
    perplexity = math.exp(part.nats / part.tokens)
    assert part.tokens == LENGTH - 1
    assert perplexity == pytest.approx(math.exp(-whole.mean()), rel=1e-6)


def test_a_pack_gives_each_document_what_it_gives_alone(model):
    documents = [tokens(n, seed=n) for n in (2, 9, 30, 3)]
    with torch.no_grad():
        alone = [model.score(document).double()[1:] for document in documents]
    for found, expected in zip(Scorer(model, 64).pack(documents), alone, strict=True):
        torch.testing.assert_close(found.scores, expected, rtol=0, atol=2e-5)


@pytest.mark.parametrize("window", [5, 100])
def test_a_complement_is_read_and_not_counted(model, window):
    ids = tokens(40).int()
    signed = torch.where(torch.arange(40) % 3 == 1, ids, ~ids)
    with torch.no_grad():
        whole = model.score(ids.long()).double()
    expected = torch.where(signed >= 0, whole, 0)[1:]
    if window < 40:
        scores, part = windowed(model, signed, window)
    else:
        (found,) = Scorer(model, window).pack([signed])
        scores, part = found.scores, Partial()
        part.add(found)
    torch.testing.assert_close(scores, expected, rtol=0, atol=2e-5)
    assert part.tokens == int((signed[1:] >= 0).sum())
    assert part.nats == pytest.approx(-float(expected.sum()), rel=1e-6)


def test_places_are_counted_by_powers_of_two(model):
    ids = tokens(40)
    scores, part = windowed(model, ids.int(), 7)
    for power in range(6):
        inside = slice(2**power - 1, 2 ** (power + 1) - 1)
        assert part.place_tokens[power] == len(scores[inside])
        assert float(part.place_nats[power]) == pytest.approx(-float(scores[inside].sum()))
    assert not part.place_tokens[6:].any()
    read = Partial.from_dict(part.to_dict())
    assert read.nats == part.nats and torch.equal(read.place_nats, part.place_nats)


def test_no_token_is_computed_twice(model, monkeypatch):
    seen = []
    forward = model.model.forward
    monkeypatch.setattr(
        model.model, "forward", lambda ids, **rest: seen.append(len(ids)) or forward(ids, **rest)
    )
    windowed(model, tokens(LENGTH).int(), 16)
    assert seen == [16, 16, 8]


def test_documents_share_a_pass_as_far_as_there_is_room():
    lengths = [5, 5, 3, 30, 2, 9, 9]
    made = list(packs(lengths, range(7), 10))
    assert made == [[0, 1, 2], [3], [4, 5], [6]]
    assert list(packs(lengths, [0, 4, 6], 10)) == [[0, 4], [6]]
    assert list(packs(lengths, [], 10)) == []


def test_work_is_dealt_evenly_and_whole():
    costs = [100, 1, 1, 1, 50, 49, 3]
    shares = deal(costs, 2)
    assert sorted(sum(shares, [])) == list(range(7))
    assert [sum(costs[piece] for piece in share) for share in shares] == [103, 102]
    assert deal([], 3) == [[], [], []]


def test_a_window_without_a_token_is_refused(model):
    with pytest.raises(ValueError, match="window is 0"):
        Scorer(model, 0)
