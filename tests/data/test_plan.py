from collections import Counter

import torch
from hypothesis import given
from hypothesis import strategies as st

from nemotron_v3.data import plan
from nemotron_v3.data.order import permutation, splitmix64
from nemotron_v3.data.plan import Position, RowPlan, best_fit

T = 20
lengths = st.lists(st.integers(1, T), min_size=1, max_size=60)


def make(sizes, weights=(1.0,), counts=None, seed=0, epochs=None) -> RowPlan:
    counts = [len(sizes)] if counts is None else counts
    return RowPlan(torch.tensor(sizes), counts, weights, T, seed, epochs)


def all_rows(made: RowPlan, step: int = 3) -> list[list[int]]:
    rows, position = [], Position()
    while True:
        taken, position = made.take(position, step)
        if not taken:
            return rows
        rows += taken


def test_splitmix64_gives_its_published_numbers():
    assert [n % 2**64 for n in splitmix64(1234567, 5).tolist()] == [
        6457827717110365317,
        3203168211198807973,
        9817491932198370423,
        4593380528125082431,
        16408922859458223821,
    ]


def test_permutation_differs_by_name_and_holds_each_number_once():
    first, again, other = (permutation(1000, 0, "epoch", n).tolist() for n in (0, 0, 1))
    assert first == again != other
    assert sorted(first) == sorted(other) == list(range(1000))


@given(lengths)
def test_best_fit_places_every_item_once_in_rows_that_hold_it(sizes):
    rows = best_fit(sizes, T)
    assert sorted(item for row in rows for item in row) == list(range(len(sizes)))
    assert all(sum(sizes[item] for item in row) <= T for row in rows)


@given(lengths)
def test_best_fit_opens_a_row_only_for_what_fits_in_no_other(sizes):
    rows = best_fit(sizes, T)
    # Items come the longest first, so the first of a row is one that no row before had room for.
    for number, row in enumerate(rows[1:], 1):
        longer = [sum(sizes[i] for i in r if sizes[i] >= sizes[row[0]]) for r in rows[:number]]
        assert all(T - used < sizes[row[0]] for used in longer)


def test_best_fit_takes_the_row_with_the_least_room():
    assert best_fit([12, 15, 5, 8], T) == [[1, 2], [0, 3]]


@given(lengths, st.integers(0, 3))
def test_every_piece_is_in_each_epoch_once(sizes, seed):
    made = make(sizes, seed=seed, epochs=3)
    rows = all_rows(made)
    assert Counter(i for row in rows for i in row) == dict.fromkeys(range(len(sizes)), 3)
    assert made.total_rows() == len(rows) == made.total_rows(at_most=len(rows) + 1)
    assert made.total_rows(at_most=len(rows) - 1) == len(rows) - 1


@given(
    st.lists(st.integers(1, 12), min_size=1, max_size=3),
    st.lists(st.sampled_from([0.25, 0.5, 1.0, 1.5, 2.0]), min_size=3, max_size=3),
)
def test_weights_are_passes_and_each_pass_ends_before_the_next(counts, weights):
    weights = weights[: len(counts)]
    made = make([1] * sum(counts), weights, counts, epochs=4)
    seen = Counter(i for row in all_rows(made) for i in row)
    first = 0
    for count, weight in zip(counts, weights, strict=True):
        times = [seen[i] for i in range(first, first + count)]
        assert sum(times) == int(4 * weight * count) and max(times) - min(times) <= 1
        first += count


@given(lengths, st.lists(st.integers(1, 5), min_size=1, max_size=6), st.integers(1, 20))
def test_rows_do_not_depend_on_how_many_are_taken_at_once(sizes, steps, window):
    made = make(sizes, epochs=2)
    before, plan.WINDOW = plan.WINDOW, window
    try:
        expected = all_rows(make(sizes, epochs=2), 1)
        position, found = Position(), []
        for step in steps:
            taken, position = made.take(position, step)
            found += taken
        assert found == expected[: sum(steps)] and position.rows == len(found)
        # Another one goes on from there.
        taken, _ = make(sizes, epochs=2).take(position, 1000)
        assert found + taken == expected
    finally:
        plan.WINDOW = before


def test_epochs_and_seeds_have_orders_of_their_own():
    sizes = [T] * 50
    rows = all_rows(make(sizes, epochs=2))
    other = all_rows(make(sizes, epochs=2, seed=1))
    assert rows[:50] != rows[50:] and rows != other
    assert sorted(rows[:50]) == sorted(rows[50:]) == [[i] for i in range(50)]


def test_a_part_of_an_epoch_takes_a_part_of_its_pieces():
    rows = all_rows(make([T] * 50, epochs=1.5))
    whole = all_rows(make([T] * 50, epochs=2))
    assert len(rows) == 75
    assert sorted(rows[:50]) == [[i] for i in range(50)] and rows[:50] == whole[:50]
    assert len({r[0] for r in rows[50:]}) == 25


def test_without_epochs_there_is_no_end():
    made = make([3, 5, 7])
    assert made.total_rows() is None
    assert len(made.take(Position(), 1000)[0]) == 1000
