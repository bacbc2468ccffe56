"""The kernels of decode_experts in Triton's interpreter: the rule, the order of choices, rows."""

from functools import partial

import pytest
import torch

from nemotron_v3 import ops
from nemotron_v3.ops.decode_experts import cases
from tests.kernels.holding_products import experts, hold_experts, hold_route, routed
from tests.kernels.interpreter import mend_bfloat16

pytest.importorskip("triton")
pytestmark = pytest.mark.skipif(torch.cuda.is_available(), reason="tests/gpu runs them compiled")

F32, BF16 = torch.float32, torch.bfloat16
NAMED = {case.name: case for case in cases.CASES}


@pytest.mark.parametrize(
    ("name", "dtype"),
    [
        ("one-row", BF16),
        ("one-choice", BF16),
        ("idle-rows", BF16),
        ("groups", F32),
        ("biased-weights", F32),
        ("none-active", F32),
    ],
)
def test_the_choice(name, dtype, monkeypatch):
    mend_bfloat16(monkeypatch)
    hold_route(NAMED[name], dtype, "cpu", "triton")


@pytest.mark.parametrize(
    ("name", "dtype"),
    [
        ("one-row", BF16),
        ("one-row-odd", F32),
        ("one-row-latent", F32),
        ("one-row-shared", BF16),
        ("one-choice", BF16),
        ("idle-rows", BF16),
        ("groups", F32),
        ("latent", BF16),
        ("shared-alone", F32),
        ("forty-rows", BF16),
        ("many-rows", F32),
        ("none-active", F32),
        ("one-row-updated", BF16),
        ("one-row-updated-alone", F32),
        pytest.param("updated", BF16, marks=pytest.mark.heavy),
        ("shared-updated", F32),
    ],
)
def test_accuracy(name, dtype, monkeypatch):
    mend_bfloat16(monkeypatch)
    hold_experts(NAMED[name], dtype, "cpu", "triton")


def test_rows_that_are_not_active_stay_and_disturb_nobody(monkeypatch):
    inputs = cases.make_inputs(NAMED["idle-rows"], F32, "cpu", torch.Generator().manual_seed(0))
    idle = ~inputs.options["active"]
    run = partial(ops.decode_experts, impl="triton")
    before = experts(run, **inputs.tensors, **inputs.options)
    choice = routed(partial(ops.decode_route, impl="triton"), **inputs.tensors, **inputs.options)
    for name in ("stream", "normed"):
        inputs.tensors[name][idle] = torch.nan
    inputs.options["active"] = inputs.options["active"].int() * 3
    after = experts(run, **inputs.tensors, **inputs.options)
    assert torch.equal(before[~idle], after[~idle]) and after[idle].isnan().all()
    again = routed(partial(ops.decode_route, impl="triton"), **inputs.tensors, **inputs.options)
    assert torch.equal(choice.slots, again.slots) and torch.equal(choice.experts, again.experts)


def test_equal_scores_go_to_the_lower_expert():
    inputs = cases.make_inputs(NAMED["one-row"], F32, "cpu", torch.Generator().manual_seed(0))
    inputs.tensors["gate"].zero_()
    inputs.tensors["bias"].zero_()
    found = routed(partial(ops.decode_route, impl="triton"), **inputs.tensors, **inputs.options)
    assert found.experts.tolist() == [[0, 1]]
