"""Runs whose experts are spread over processes, and that go on with another plan."""

import shutil
from dataclasses import replace

import pytest

from nemotron_v3.train.options import (
    LoraOptions,
    OptimizerOptions,
    PlanOptions,
    ScheduleOptions,
    TrainOptions,
    ValidationOptions,
)
from tests.train.fakes import made_up_options
from tests.train.test_processes import asked as asked
from tests.train.test_processes import ended_by, run
from tests.train.test_run import SILENT, lines, losses, train

pytestmark = pytest.mark.integration


def test_a_run_goes_on_with_another_plan(asked, tmp_path):
    """Two processes of `ep = 2`, four of `ep = 4`, three that shard; 5 rows, so that some of them
    have none. What they export is, byte for byte, what one process makes of their save."""
    data = made_up_options(rows=5)
    whole, moved = asked("whole", data=data), asked("moved", data=data)
    run(whole, 1)
    for size, ep, steps in ((2, 2, 3), (4, 4, 6), (3, 1, 9)):
        options = replace(moved, plan=PlanOptions(ep=ep))
        if steps < 9:
            ended_by(options, size, steps)
        else:
            run(options, size)
    first, second = losses(whole.out), losses(moved.out)
    assert first.keys() == second.keys()
    assert second[1] == pytest.approx(first[1], rel=1e-6)
    assert all(second[n] == pytest.approx(first[n], rel=1e-4) for n in first)
    alone = replace(moved, out=tmp_path / "alone")
    shutil.copytree(moved.out, alone.out)
    (alone.out / "model.safetensors").unlink()
    run(alone, 1)
    weights = [(o.out / "model.safetensors").read_bytes() for o in (moved, alone)]
    assert weights[0] == weights[1]


def test_adapters_of_experts_that_are_spread(asked):
    pytest.importorskip("peft")
    from nemotron_v3.hf import lora

    told = {
        "lora": LoraOptions(rank=2, groups=("attention", "routed")),
        "schedule": ScheduleOptions(steps=3),
    }
    alone, many = asked("alone", **told), asked("many", plan=PlanOptions(ep=2), **told)
    train(alone, adapters=lora, **SILENT)
    run(many, 2)
    first, second = losses(alone.out), losses(many.out)
    assert all(second[n] == pytest.approx(first[n], rel=1e-5) for n in first)


def test_a_plan_is_of_a_model_that_is_sharded():
    refused = replace(TrainOptions(data=made_up_options()), plan=PlanOptions(ep=2), parallel="ddp")
    with pytest.raises(ValueError, match='plan is of a model that is sharded.*parallel = "fsdp"'):
        refused.check()


def test_one_process_refuses_a_plan_of_several(asked):
    with pytest.raises(ValueError, match="ep = 2 does not divide dp_shard = 1"):
        run(asked("refused", plan=PlanOptions(ep=2)), 1)


def test_a_run_shares_the_tokens_of_rows_and_goes_on_without(asked):
    """Two processes share all rows; four are two pairs, whose experts lie on all; one goes on."""
    validation = ValidationOptions(sources=made_up_options().sources, rows=2, every=2)
    told = {"validation": validation, "optimizer": OptimizerOptions(balance=1e-3)}
    data = made_up_options(rows=3)
    whole, moved = (asked(name, data=data, **told) for name in ("whole", "moved"))
    run(whole, 1)
    zigzag = PlanOptions(cp=2, cp_layout="zigzag")
    ended_by(replace(moved, plan=zigzag), 2, 3)
    ended_by(replace(moved, plan=PlanOptions(cp=2, ep=4)), 4, 6)
    run(moved, 1)
    first, second = (lines(o.out) for o in (whole, moved))
    assert len(first) == len(second)
    for one, other in zip(first, second, strict=True):
        assert one.keys() == other.keys()
        for name in ("step", "tokens", "targets"):
            assert one.get(name) == other.get(name), name
        for name in one.keys() & {"loss", "gradient_norm", "validation_loss"}:
            assert other[name] == pytest.approx(one[name], rel=1e-4), name


def test_processes_that_cannot_share_tokens_say_so(asked, monkeypatch):
    monkeypatch.setenv("WORLD_SIZE", "4")
    with pytest.raises(ValueError, match=r"plan\.cp is 3, which does not divide the 4 processes"):
        train(asked("refused", plan=PlanOptions(cp=3)), **SILENT)
    assert not (asked("refused").out).exists()
