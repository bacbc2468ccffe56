from collections import Counter
from itertools import islice, pairwise

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from nemotron_v3.data.packing import Pack, cut, pack_whole, training_packs

# Documents whose tokens are all different, so that a pair of neighbours names its place.
lengths = st.lists(st.integers(0, 40), min_size=1, max_size=8)


def documents_of(sizes: list[int]) -> list[list[int]]:
    numbers = iter(range(10_000))
    return [list(islice(numbers, size)) for size in sizes]


def predictions(pack: Pack) -> list[tuple[int, int]]:
    """Each predicted token of the pack beside the token before it."""
    ids, offsets = pack.input_ids.tolist(), pack.layout.offsets
    return [pair for a, b in pairwise(offsets) for pair in pairwise(ids[a:b])]


def places(documents: list[list[int]]) -> Counter:
    return Counter(pair for document in documents for pair in pairwise(document))


@given(lengths, st.integers(2, 50))
def test_cutting_predicts_every_token_once(sizes, max_length):
    documents = documents_of(sizes)
    pieces = [piece for document in documents for piece in cut(document, max_length)]
    assert all(2 <= len(piece) <= max_length for piece in pieces)
    assert places(pieces) == places(documents)


@given(lengths, st.integers(1, 60))
def test_whole_packs_keep_the_documents_and_their_order(sizes, tokens):
    documents = documents_of(sizes)
    packs = list(pack_whole(documents, tokens))
    found = [
        pack.input_ids[a:b].tolist() for pack in packs for a, b in pairwise(pack.layout.offsets)
    ]
    assert found == documents
    # Only a document that is alone too long makes a pack longer than asked for.
    assert all(pack.layout.num_tokens <= max(tokens, *pack.layout.lengths) for pack in packs)
    assert sum(pack.num_targets for pack in packs) == places(documents).total()


@given(lengths.filter(lambda sizes: max(sizes) > 1), st.integers(2, 30), st.integers(2, 30))
def test_a_pass_of_training_packs_predicts_every_token_once(sizes, tokens, max_length):
    documents = documents_of(sizes)
    expected = places(documents)
    seen: list[tuple[int, int]] = []
    for pack in training_packs(documents, tokens, max_length, seed=0):
        assert pack.layout.num_tokens == tokens == len(pack.input_ids)
        assert max(pack.layout.lengths) <= max_length
        seen += predictions(pack)
        if len(seen) >= expected.total():
            break
    assert Counter(seen[: expected.total()]) == expected


def test_training_packs_are_the_seeds_and_go_on_past_the_first_pass():
    documents = documents_of([30, 40, 50])
    first, again, other = (
        torch.stack([p.input_ids for p in islice(training_packs(documents, 16, 8, seed), 40)])
        for seed in (0, 0, 1)
    )
    assert torch.equal(first, again)
    assert not torch.equal(first, other)


def test_sizes_and_documents_that_leave_nothing_to_predict_are_errors():
    with pytest.raises(ValueError, match="pieces of 1 predict nothing"):
        next(training_packs([[1, 2]], tokens=8, max_length=1, seed=0))
    with pytest.raises(ValueError, match="none of the 2 documents has two tokens"):
        next(training_packs([[1], []], tokens=8, max_length=8, seed=0))
