"""What the pages show is what the script makes of today's figures."""

import pytest

from benchmarks import pages
from nemotron_v3.config import PRESETS


def test_the_tables_of_machines_are_those_of_the_cost_model():
    page = pages.MACHINES_PAGE.read_text("utf-8")
    assert pages.with_tables(page) == page, "run python -m benchmarks.pages"


def test_the_picture_shows_the_figures_of_the_results(tmp_path):
    drawn = pages.PICTURE.read_text("utf-8")
    found = list(pages.ratios())
    assert len(found) == len(pages.BARS) and all(ratio > 1 for *_, ratio in found)
    for label, peer, ratio in found:
        assert f"{ratio:.1f}x" in drawn, "run python -m benchmarks.pages"
        assert label in drawn and peer in drawn
    pages.draw(tmp_path / "again.svg")
    assert f"{found[0][2]:.1f}x" in (tmp_path / "again.svg").read_text("utf-8")


def test_a_range_counts_by_its_lower_end_and_thousands_may_stand_apart():
    cells = (" 5252-6279 ", " 17 805 ", " 608 ms, 50.5 GiB ", " 2019 (1.70x) ")
    assert [*map(pages._number, cells)] == [5252, 17805, 608, 2019]


@pytest.mark.parametrize("model", PRESETS)
def test_what_a_model_needs_grows_from_use_to_use(model):
    need = pages.needs(model)
    assert need["weights"] < need["generate"] and need["weights"] < need["LoRA"] < need["full"]
    assert need["full"] == pytest.approx(8 * need["weights"])
