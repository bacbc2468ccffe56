"""Which tokens each process has: known of the lengths alone."""

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from nemotron_v3 import SequenceLayout
from nemotron_v3.parallel.shares import Shares

LENGTHS = st.lists(st.integers(0, 9), min_size=1, max_size=8)


@given(LENGTHS, st.integers(1, 5), st.sampled_from(["contiguous", "zigzag"]))
def test_every_token_has_one_process_and_its_document(lengths, size, order):
    layout = SequenceLayout.from_lengths(lengths)
    everyone = [Shares.of(layout, size, rank, order) for rank in range(size)]
    index = torch.cat([shares.index for shares in everyone])
    assert sorted(index.tolist()) == list(range(layout.num_tokens))
    document = layout.seq_idx.tolist()
    for shares in everyone:
        assert shares.tokens_of(shares.rank) == len(shares.index) == shares.local.num_tokens
        places = shares.index.tolist()
        whole = [document[i] for i in places]
        pieces = shares.local.seq_idx.tolist()
        for a in range(len(places) - 1):  # a piece is of one document, without a gap
            if pieces[a] == pieces[a + 1]:
                assert whole[a] == whole[a + 1] and places[a] + 1 == places[a + 1]
        for j in shares.own:
            share = shares.all[j]
            if share.start < share.end:
                first = share.start - share.before
                assert document[first] == document[share.start]
                assert first == 0 or document[first - 1] != document[first]
                inside = document[share.start] != document[share.end - 1]
                assert share.has_border == inside


@pytest.mark.parametrize(
    ("lengths", "size", "wanted"),
    [
        ([8192], 2, "contiguous"),
        ([131_072], 2, "zigzag"),
        ([1024] * 128, 2, "contiguous"),  # all are as long: it is even already
        ([131_072] + [64] * 2048, 2, "zigzag"),  # the first process has all of the long one
    ],
)
def test_two_segments_a_process_where_one_would_wait(lengths, size, wanted):
    layout = SequenceLayout.from_lengths(lengths)
    assert Shares.of(layout, size, 0, "auto").order == wanted


@given(LENGTHS, st.integers(1, 4), st.data())
def test_tokens_that_somebody_else_has_cut(lengths, size, data):
    layout = SequenceLayout.from_lengths(lengths)
    ranks = data.draw(st.permutations([*range(size)] * 3))
    inner = st.integers(0, layout.num_tokens)
    cuts = data.draw(st.lists(inner, min_size=3 * size - 1, max_size=3 * size - 1))
    bounds = [0, *sorted(cuts), layout.num_tokens]
    for rank in range(size):
        shares = Shares.at(layout, bounds, ranks, rank)
        wanted = [
            i
            for start, end, of in zip(bounds[:-1], bounds[1:], ranks, strict=True)
            if of == rank
            for i in range(start, end)
        ]
        assert shares.index.tolist() == wanted and shares.size == size
        assert sum(shares.local.lengths) == len(wanted)
