"""The kernels of skinny_linear in Triton's interpreter: the rule, rows, blocks."""

import pytest
import torch

from nemotron_v3.ops.skinny_linear import cases
from tests.kernels.holding_products import form, hold_linear, linear
from tests.kernels.interpreter import mend_bfloat16

pytest.importorskip("triton")
pytestmark = pytest.mark.skipif(torch.cuda.is_available(), reason="tests/gpu runs them compiled")

F32, BF16 = torch.float32, torch.bfloat16
NAMED = {case.name: case for case in cases.CASES}


def drawn(name: str, dtype: torch.dtype = F32) -> dict:
    inputs = cases.make_inputs(NAMED[name], dtype, "cpu", torch.Generator().manual_seed(0))
    return inputs.tensors | inputs.options


@pytest.mark.parametrize("case", cases.CASES, ids=lambda case: case.name)
def test_accuracy(case, monkeypatch):
    mend_bfloat16(monkeypatch)
    hold_linear(case, F32 if case.strided else BF16, "cpu", "triton")


@pytest.mark.parametrize("name", ["seventeen-rows", "by-group", "forty-rows"])
def test_a_row_does_not_feel_its_neighbours(name, monkeypatch):
    """Whatever they hold."""
    mend_bfloat16(monkeypatch)
    arguments = drawn(name, BF16)
    before = linear(form("triton"), **arguments)
    for name in ("x", "residual"):
        if arguments[name] is not None:
            arguments[name][::2] = torch.nan
    after = linear(form("triton"), **arguments)
    assert torch.equal(before[1::2], after[1::2]) and after[::2].isnan().all()


@pytest.mark.parametrize("shared", [99, 163, 227])
def test_blocks_fit_the_memory_there_is(shared):
    from nemotron_v3.ops.decode_experts.kernels.launch import blocks_of as of_experts
    from nemotron_v3.ops.skinny_linear.kernels.launch import blocks_of

    for rows in (2, 16, 17, 32, 64, 128):
        for dtype, size in ((F32, 4), (BF16, 2)):
            for outputs in (2688, 131072):
                blocks = blocks_of(rows, outputs, dtype, shared * 1024)
                assert blocks.shared(size, 4) <= shared * 1024 and blocks.stages >= 2
            blocks = of_experts(rows, size, shared * 1024)
            assert blocks.shared(size, size) <= shared * 1024 and blocks.stages >= 2
