"""The kernel of decode_mamba2 in Triton's interpreter: the rule, the slots of one launch."""

import pytest
import torch

from nemotron_v3.ops.decode_mamba2 import cases
from tests.kernels.holding_decode import hold, results
from tests.kernels.interpreter import mend_bfloat16

pytest.importorskip("triton")
pytestmark = pytest.mark.skipif(torch.cuda.is_available(), reason="tests/gpu runs them compiled")

F32, F16, BF16 = torch.float32, torch.float16, torch.bfloat16
NAMED = {case.name: case for case in cases.CASES}


def drawn(case: cases.Case, dtype: torch.dtype = F32):
    return cases.make_inputs(case, dtype, "cpu", torch.Generator().manual_seed(0))


@pytest.mark.parametrize(
    ("name", "dtype"),
    [
        ("first-tokens", BF16),
        ("idle-slots", BF16),
        ("odd", F32),
        ("odd", F16),
        ("eight-taps", F32),
        ("long-decay", F32),
    ],
)
def test_accuracy(name, dtype, monkeypatch):
    mend_bfloat16(monkeypatch)
    hold("decode_mamba2", NAMED[name], dtype, "cpu", "triton")


@pytest.mark.parametrize("p", [8, 16])
def test_how_the_state_is_cut_changes_no_bit(p, monkeypatch):
    from nemotron_v3.ops.decode_mamba2 import kernels

    inputs = drawn(NAMED["odd"])
    whole = results("decode_mamba2", inputs, "triton")
    monkeypatch.setattr(kernels, "blocks", lambda *sizes: kernels.Blocks(p, 1))
    cut = results("decode_mamba2", inputs, "triton")
    assert all(torch.equal(whole[name], cut[name]) for name in whole)


def test_slots_that_are_not_active_keep_every_bit_and_disturb_nobody():
    inputs = drawn(NAMED["idle-slots"])
    idle = ~inputs.options["active"]
    before = results("decode_mamba2", inputs, "triton")
    for name in ("projected", "conv", "ssm"):
        inputs.tensors[name][idle] = torch.nan
    inputs.options["active"] = inputs.options["active"].int() * 7
    after = results("decode_mamba2", inputs, "triton")
    assert all(torch.equal(before[name][~idle], after[name][~idle]) for name in before)
    assert not after["out"][idle].any()
    assert after["conv"][idle].isnan().all() and after["ssm"][idle].isnan().all()


def test_a_slot_does_not_feel_its_neighbours():
    """Bit by bit: among others, or alone; from a strided projection."""
    inputs = drawn(NAMED["first-tokens"])
    together = results("decode_mamba2", inputs, "triton")
    wider = torch.cat([inputs.tensors["projected"], torch.full((5, 3), torch.nan)], 1)
    alone = {name: inputs.tensors[name][2:3].clone() for name in ("conv", "ssm")}
    alone |= {name: inputs.options[name][2:3].clone() for name in ("positions", "active")}
    found = results("decode_mamba2", inputs, "triton", projected=wider[2:3, :-3], **alone)
    assert all(torch.equal(together[name][2:3], found[name]) for name in together)


@pytest.mark.parametrize("place", [0, 40, -1], ids=["gate", "input", "step"])
def test_what_is_not_a_number_is_seen(place):
    inputs = drawn(cases.Case("one", (5,), 2, 16, 1, 16))
    inputs.tensors["projected"][0, place] = torch.nan
    assert results("decode_mamba2", inputs, "triton")["out"].isnan().any()
