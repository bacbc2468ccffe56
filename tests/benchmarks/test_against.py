"""Rows of two trees: what counts as slower, and two processes that take turns."""

import pytest

from benchmarks import turns
from benchmarks.against import Missing, Pair, Tree, compare, render
from benchmarks.measure import ROOT

ROW = {"work": "step", "shape": "1 x 8", "unit": "s", "ours": 1.0}
EVEN = [1.0] * 7


@pytest.mark.parametrize(
    "before, after, slower",
    [
        (EVEN, [1.02] * 7, False),
        (EVEN, [1.04] * 7, True),
        (EVEN, [0.5] * 7, False),
        # one sample of seven that something else has met is left out of the spread
        (EVEN, [1.04] * 6 + [9.0], True),
        # longer in the median, and by less than the samples of one tree lie apart
        ([0.9, 0.9, 1.0, 1.0, 1.0, 1.1, 1.1], [1.05] * 7, False),
        (EVEN, [0.9, 0.9, 1.0, 1.05, 1.1, 1.2, 1.2], False),
    ],
)
def test_a_row_is_slower_beyond_three_percent_and_the_spread(before, after, slower):
    assert Pair(ROW, ROW, (before, after)).slower is slower


def test_a_value_that_is_no_time_has_no_spread_and_a_missing_one_no_change():
    size = Pair(ROW | {"ours": 100.0}, ROW | {"ours": 150.0}, ([], []))
    assert (size.change, size.spread, size.slower) == (1.5, None, False)
    gone = Pair(ROW, ROW | {"ours": "OOM"}, ([], []))
    assert gone.change is None and not gone.slower


def test_the_table_marks_slower_rows_and_lists_what_a_tree_lacks():
    found = [
        Pair(ROW, ROW | {"ours": 2.0}, (EVEN, [2.0] * 7)),
        Pair(ROW, ROW | {"ours": "OOM"}, ([], [])),
        Missing("norm", "the other tree: ImportError: no such op"),
    ]
    assert render(found).splitlines() == [
        "work  shape  unit  other tree  this tree   change  spread",
        "----  -----  ----  ----------  ---------  -------  ------  ------",
        "step  1 x 8  s              1          2  +100.0%    0.0%  SLOWER",
        "step  1 x 8  s              1        OOM",
        "norm, the rest: the other tree: ImportError: no such op",
    ]


def test_alone_a_suite_takes_all_its_samples():
    assert turns.samples(iter([3.0, 1.0, 2.0]).__next__, repeats=3) == [3.0, 1.0, 2.0]
    assert turns.compares_peers()


@pytest.mark.integration
def test_two_trees_take_turns_and_a_section_that_one_lacks_is_left(tmp_path):
    package = tmp_path / "src" / "nemotron_v3"
    package.mkdir(parents=True)
    (package / "__init__.py").write_text("SECONDS = 1.0\n")
    before, after = (Tree(tree, "tests.benchmarks.turning") for tree in (tmp_path, ROOT))
    step, missing, size = compare(before, after, turns=3)
    assert step.samples == ([1.0, 1.001, 1.002], [2.0, 2.001, 2.002])
    assert step.slower and (step.before["ours"], step.after["ours"]) == (1.001, 2.001)
    assert missing == Missing("new", "the other tree: ImportError: no such op here")
    assert (size.before["ours"], size.after["ours"]) == (100.0, 200.0) and not size.slower
    assert (before.close(), after.close()) == (0, 0)
