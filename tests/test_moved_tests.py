"""The comparison of two collections of tests."""

import pytest

from tests.moved_tests import lost, read_map

MAP = """
# Moves
- `tests/a.py -> tests/b/a.py`
tests/a.py::test_x -> tests/c.py::test_y
tests/a.py::test_z[1-k] -> gone: said twice
no line of a map
"""


@pytest.mark.parametrize(
    ("before", "after"),
    [
        ("tests/a.py::test_v[2]", "tests/b/a.py::test_v[2]"),
        ("tests/a.py::test_x[2]", "tests/c.py::test_y[2]"),
        ("tests/a.py::test_x", "tests/c.py::test_y"),
        ("tests/a.py::test_z[1-k]", "tests/other.py::test_q"),
        ("tests/d.py::test_p[layers/old.py]", "tests/d.py::test_p[layers/moe/new.py]"),
    ],
)
def test_a_test_goes_on_under_its_new_name(before, after):
    assert lost([before], [after], read_map(MAP)) == []
    assert lost([before], ["tests/d.py::test_x"], read_map(MAP)) == (
        [] if "test_z" in before else [before.removesuffix("[layers/old.py]")]
    )


def test_a_case_that_is_gone_is_found_though_its_function_stays():
    before = ["tests/d.py::test_p[1]", "tests/d.py::test_p[2]"]
    assert lost(before, before[:1], {}) == before[1:]
