"""The learning rate's course."""

import pytest
import torch

from nemotron_v3.train.options import ScheduleOptions
from nemotron_v3.train.schedule import make_scheduler, scale


def test_it_rises_and_falls_as_its_shape_says():
    shapes = {
        "linear": [0.5, 1.0, 0.5, 0.01],
        "cosine": [0.5, 1.0, 0.5, 0.01],
        "constant": [0.5, 1.0, 1.0, 1.0],
        "stable-decay": [0.5, 1.0, 1.0, 0.01],
    }
    for shape, expected in shapes.items():
        options = ScheduleOptions(warmup=0.2, shape=shape, least=0.01, decay=0.1)
        assert [scale(options, x) for x in (0.1, 0.2, 0.6, 1.0)] == pytest.approx(expected)
    assert scale(ScheduleOptions(shape="stable-decay", decay=0.1), 0.95) == pytest.approx(0.5)
    assert scale(ScheduleOptions(shape="cosine", warmup=0), 0.25) == pytest.approx(0.853553, 1e-5)


@pytest.mark.parametrize("shape", ["cosine", "linear", "stable-decay"])
def test_no_step_is_wasted(shape):
    options = ScheduleOptions(shape=shape, warmup=0.1, least=1e-3)
    assert all(scale(options, x / 100) >= 1e-3 for x in range(-5, 110))


def test_a_scheduler_begins_where_a_run_goes_on():
    def rates(first: int, count: int) -> list[float]:
        optimizer = torch.optim.AdamW([torch.nn.Parameter(torch.ones(1))], lr=0.5)
        options = ScheduleOptions(warmup=0.3)
        scheduler = make_scheduler(optimizer, options, 0.5, lambda n: (n + 0.5) / 10, first)
        told = []
        for _ in range(count):
            told.append(optimizer.param_groups[0]["lr"])
            optimizer.step()
            scheduler.step()
        return told

    whole = rates(0, 10)
    assert rates(4, 6) == whole[4:]
    assert max(whole) <= 0.5 and whole[0] < whole[2] and whole[9] < whole[4]
