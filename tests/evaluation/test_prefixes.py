"""Forests of shared prefixes, and feeding them."""

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from nemotron_v3.evaluation.forks import Forks
from nemotron_v3.evaluation.prefixes import Stretch, shared_prefixes
from nemotron_v3.generation import generate
from tests.models import tiny_model, tokens


@pytest.fixture(scope="module")
def model():
    return tiny_model().eval()


def leaves(stretches: list[Stretch], before: tuple[int, ...] = ()):
    """The whole sequence of each leaf, and its members."""
    for stretch in stretches:
        assert stretch.start == len(before)
        whole = (*before, *stretch.tokens)
        yield from leaves(stretch.children, whole)
        if stretch.members:
            assert not stretch.children
            yield whole, stretch.members


def count(stretches: list[Stretch]) -> int:
    return sum(len(s.tokens) + count(s.children) for s in stretches)


sequences = st.lists(st.lists(st.integers(0, 2), max_size=9), max_size=9)


@given(sequences, st.integers(1, 6))
def test_every_sequence_is_found_once(given, least):
    found = [
        (whole, n) for whole, members in leaves(shared_prefixes(given, least)) for n in members
    ]
    assert sorted(n for _, n in found) == list(range(len(given)))
    assert all(tuple(given[n]) == whole for whole, n in found)


@given(sequences)
def test_with_every_token_worth_it_no_prefix_is_there_twice(given):
    prefixes = {tuple(s[:n]) for s in given for n in range(1, len(s) + 1)}
    assert count(shared_prefixes(given, 1)) == len(prefixes)


def test_only_what_saves_enough_is_shared():
    given = [[1, 2, 3, 4], [1, 2, 5], [1, 6]]
    assert count(shared_prefixes(given, 1)) == 6
    assert count(shared_prefixes(given, 100)) == 9
    assert count(shared_prefixes([*given, [1, 6]], None)) == 9  # equal ones are one


def plain(model, sequence: list[int]) -> torch.Tensor:
    with torch.no_grad():
        return model.model(torch.tensor(sequence)).last_hidden_state


def family() -> list[list[int]]:
    """Sequences that share stretches in two levels, one that ends within another, and strangers."""
    ids = tokens(90).tolist()
    shared, further = ids[:40], ids[40:60]
    return [
        [*shared, *further, 1, 2],
        [*shared, *further, 3],
        [*shared, 4, 5, 6],
        [*shared, *further],
        ids[60:75],
        [*shared, *further, 3],
        [7],
    ]


@pytest.mark.parametrize(("window", "rows"), [(11, 2), (50, 1), (50, 3), (1000, 32)])
def test_a_shared_stretch_is_fed_once_and_changes_nothing(model, window, rows):
    given = family()
    forks = Forks(model, window, rows, least=8)
    hidden = [torch.zeros(len(s), model.config.hidden_size) for s in given]
    done = []
    for pieces, complete in forks.feed(given):
        for piece in pieces:
            start = piece.stretch.start + piece.start
            for number in piece.stretch.through():
                hidden[number][start : start + len(piece.hidden)] = piece.hidden
        done += complete
    assert sorted(done) == list(range(len(given)))
    for sequence, found in zip(given, hidden, strict=True):
        torch.testing.assert_close(found, plain(model, sequence), rtol=1e-4, atol=1e-4)
    assert forks.computed == 60 + 2 + 1 + 3 + 15 + 1


def test_no_states_are_left_behind(model):
    forks = Forks(model, 50, 2, least=8)
    seen = set()
    for pieces, _ in forks.feed(family()):
        for piece in pieces:
            seen.update({piece.stretch, piece.stretch.parent} - {None})
    assert len(seen) > 4 and all(stretch.state is None for stretch in seen)


@pytest.mark.parametrize("rows", [2, 32])
def test_a_fork_goes_on_as_the_whole_prompt_does(model, rows):
    prompts = [sequence for sequence in family() if len(sequence) > 1]
    told = {"max_new_tokens": 5, "eos_token_id": []}
    alone = [generate(model, [prompt], **told).sequences[0].tolist() for prompt in prompts]
    forks = Forks(model, 50, rows, least=8)
    found = {}
    for numbers, cache in forks.leaves([prompt[:-1] for prompt in prompts]):
        assert len(numbers) <= rows
        rows_of = [prompts[number] for number in numbers]
        out = generate(model, rows_of, past_key_values=cache, **told)
        for place, number in enumerate(numbers):
            found[number] = out.sequences[place, : out.lengths[place]].tolist()
    assert [found[number] for number in range(len(prompts))] == alone
    assert forks.computed < 70
