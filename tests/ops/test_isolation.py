"""What is not a number stays with its token and its token's experts, in the portable forms."""

import pytest
import torch

from nemotron_v3.ops.experts import cases as experts_cases
from nemotron_v3.ops.experts import portable_runs
from nemotron_v3.ops.grouped_low_rank import cases as low_rank_cases
from nemotron_v3.ops.grouped_low_rank import portable as low_rank_portable
from tests.kernels.isolation import SPOILT, hold_isolation


def inputs(op: str, dtype: torch.dtype):
    if op == "experts":
        cases, case = experts_cases, experts_cases.Case("nan", 60, 40, 48, 4, 2)
    else:
        cases, case = low_rank_cases, low_rank_cases.Case("nan", 60, 40, 48, 4, 2, 8)
    return cases.make_inputs(case, dtype, "cpu", torch.Generator().manual_seed(0))


@pytest.mark.parametrize("spoilt", SPOILT)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("op", ["experts", "grouped_low_rank"])
def test_portable(op, dtype, spoilt):
    hold_isolation(op, inputs(op, dtype), spoilt, "portable")


@pytest.mark.parametrize("spoilt", SPOILT)
def test_experts_by_runs(monkeypatch, spoilt):
    """The form for wide experts, at small ones."""
    monkeypatch.setattr(portable_runs, "takes", lambda *args: True)
    hold_isolation("experts", inputs("experts", torch.float32), spoilt, "portable")


@pytest.mark.parametrize("spoilt", SPOILT)
def test_grouped_products(monkeypatch, spoilt):
    """The GPU's path of the low-rank updates, on a CPU."""
    monkeypatch.setattr(low_rank_portable, "_takes_grouped", lambda x, stacks: True)
    op = "grouped_low_rank"
    hold_isolation(op, inputs(op, torch.bfloat16), spoilt, "portable")
