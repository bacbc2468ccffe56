"""What a plan may be, and how far tokens travel in one."""

import pytest

from nemotron_v3.parallel import Plan
from nemotron_v3.parallel.plan import gathered_rows, sent_rows


@pytest.mark.parametrize(
    ("fields", "told"),
    [
        ({"ep": 0}, "Plan.ep is 0: give an integer"),
        ({"dp_replicate": True}, "Plan.dp_replicate is True"),
        ({"dp_shard": -1}, "Plan.dp_shard is -1"),
        ({"cp": 0}, "Plan.cp is 0: give an integer"),
        ({"cp_layout": "ring"}, "Plan.cp_layout is 'ring': give one of"),
        ({"dispatcher": "deepep"}, "Plan.dispatcher is 'deepep': give one of"),
    ],
)
def test_sizes_that_cannot_be_are_refused(fields, told):
    with pytest.raises(ValueError, match=told):
        Plan(**fields)


@pytest.mark.parametrize(
    ("plan", "told"),
    [
        (Plan(dp_replicate=3), "dp_replicate = 3 times dp_shard = what is left, and there are 8"),
        (Plan(dp_shard=2), "dp_shard = 2, and there are 8 processes"),
        (Plan(dp_replicate=2, ep=8), "ep = 8 does not divide dp_shard = 4"),
        (Plan(cp=3), "cp = 3 times dp_replicate = 1 does not divide the 8 processes"),
        (Plan(cp=4, dp_shard=4), "cp = 4 times dp_shard = 4, and there are 8 processes"),
        (Plan(cp=4, ep=3), "ep = 3 does not divide cp = 4 times dp_shard = 2"),
    ],
)
def test_a_plan_makes_up_all_processes(plan, told):
    assert Plan(dp_replicate=2, ep=2).over(8) == Plan(dp_replicate=2, dp_shard=4, ep=2)
    shared = Plan(dp_replicate=2, cp=2, ep=4).over(8)
    assert shared == Plan(dp_replicate=2, dp_shard=2, cp=2, ep=4) and shared.set_size == 4
    with pytest.raises(ValueError, match=told):
        plan.over(8)


def test_a_plan_for_more_processes_than_there_are_names_what_was_given():
    with pytest.raises(ValueError, match="dp_replicate = 3 times .*, and there are 2 processes"):
        Plan(dp_replicate=3).over(2)


@pytest.mark.parametrize("world", [0, -2, 2.0, True, "8"])
def test_a_number_of_processes_that_is_none_is_named(world):
    with pytest.raises(ValueError, match="a plan is over .* processes"):
        Plan().over(world)


def test_rows_on_the_way():
    """Nano, 6 of 128 experts: over two processes nearly every token has experts on both."""
    assert sent_rows(128, 6, 2) == pytest.approx(0.99, abs=0.01)
    assert [round(gathered_rows(ep) / sent_rows(128, 6, ep), 2) for ep in (2, 4, 8)] == [
        1.01,
        1.21,
        1.79,
    ]
    assert [Plan(ep=ep).gathers(128, 6) for ep in (2, 4, 8)] == [True, True, False]
    assert Plan(ep=8, dispatcher="gather").gathers(128, 6)
    # Super, 22 of 512.
    assert [Plan(ep=ep).gathers(512, 22) for ep in (8, 16, 32)] == [True, True, False]
