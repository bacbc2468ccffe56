"""The table of ops: everything reads it, and it says everything once."""

import inspect
from importlib import import_module
from itertools import product

import pytest
import torch

from nemotron_v3 import ops
from nemotron_v3.layout import SequenceLayout
from nemotron_v3.ops.common import host
from nemotron_v3.ops.registry import FUNCTIONS, OPS, Op
from nemotron_v3.ops.rms_norm import portable, reference


def test_the_table_holds_every_public_op_under_its_name():
    functions = {name: f for name, f in vars(ops).items() if inspect.isfunction(f)}
    with_forms = {n: f for n, f in functions.items() if "impl" in inspect.signature(f).parameters}
    assert with_forms == FUNCTIONS
    assert {name: op.name for name, op in OPS.items()} == {name: name for name in with_forms}


def test_no_op_is_registered_twice():
    with pytest.raises(ValueError, match="rms_norm is registered twice"):
        Op("rms_norm", reference.rms_norm, portable.rms_norm).public(ops.rms_norm)
    assert FUNCTIONS["rms_norm"] is ops.rms_norm


@pytest.mark.parametrize("name", sorted(OPS))
def test_every_op_has_its_forms_its_case_and_its_kernels(name):
    op = OPS[name]
    if op.check is not None:
        cases = import_module(f"nemotron_v3.ops.{op.check.cases_of or name}.cases")
        assert [case.name for case in cases.CASES].count(op.check.case) == 1
        assert op.check.adapt is None or callable(getattr(cases, op.check.adapt))
    if op.kernels is not None:
        pytest.importorskip("triton")
        assert callable(op.kernels())
        assert op.refuse is not None
    given, taken = (set(inspect.signature(f).parameters) for f in (op.portable, FUNCTIONS[name]))
    assert given <= taken


def counted(monkeypatch) -> list[str]:
    """The ops that work out a choice from now on."""
    seen = []
    resolve = Op._resolve
    monkeypatch.setattr(
        Op, "_resolve", lambda op, *args: seen.append(op.name) or resolve(op, *args)
    )
    return seen


def norm(impl: str = "auto", dtype: torch.dtype = torch.float32, width: int = 8) -> torch.Tensor:
    return ops.rms_norm(
        torch.ones(2, width, dtype=dtype), torch.ones(width, dtype=dtype), impl=impl
    )


def test_a_choice_is_worked_out_once(monkeypatch):
    impls, dtypes = ("auto", "portable", "reference"), (torch.float32, torch.bfloat16)
    for impl, dtype in product(impls, dtypes):
        norm(impl, dtype)
    seen = counted(monkeypatch)
    for impl, dtype in product(impls, dtypes):
        norm(impl, dtype, width=12)
    assert seen == []


def test_what_is_picked_runs_outside_autocast():
    """The operands would be rounded to 16 bits inside."""
    x, weight = torch.ones(2, 8), torch.ones(8)
    op = Op("products", lambda x, weight: x @ weight, lambda x, weight: x @ weight)
    for impl in ("portable", "reference"):
        with torch.autocast("cpu", torch.bfloat16):
            assert (x @ weight).dtype == torch.bfloat16
            assert op.pick(impl, (x, weight))(x, weight).dtype == torch.float32


def test_without_a_gpu_nobody_asks_what_kernels_refuse(monkeypatch):
    def refuse(*_):
        raise AssertionError("asked")

    op = Op("norm", reference.rms_norm, portable.rms_norm, portable.rms_norm, refuse)
    given = (torch.ones(2, 8, dtype=torch.float64), torch.ones(8))
    assert op.pick("auto", given, 8) is op.pick("portable", given, 8) is portable.rms_norm
    monkeypatch.setattr(host, "can_launch", lambda device: True)
    with pytest.raises(AssertionError, match="asked"):
        op.pick("triton", given, 8)


def test_kernels_are_chosen_by_dtype_and_size(monkeypatch):
    monkeypatch.setattr(host, "can_launch", lambda device: True)
    asked = []

    def refuse(dtypes, width):
        asked.append((*dtypes, width))
        return "too wide" if width > 8 else None

    def kernels():
        return reference.rms_norm

    op = Op("norm", reference.rms_norm, portable.rms_norm, kernels, refuse)
    x, weight = torch.ones(2, 8), torch.ones(8)
    for _ in range(2):
        assert op.pick("triton", (x, weight), 8) is reference.rms_norm
        assert op.pick("triton", (x.half(), weight), 8) is reference.rms_norm
        assert op.pick("triton", (x, None), 8) is reference.rms_norm
    assert asked == [
        (torch.float32, torch.float32, 8),
        (torch.float16, torch.float32, 8),
        (torch.float32, None, 8),
    ]
    for _ in range(2):  # an error is not remembered
        with pytest.raises(RuntimeError, match="the Triton form cannot run here: too wide"):
            op.pick("triton", (x, weight), 9)
    assert len(asked) == 5


def test_an_unknown_impl_names_the_known_ones():
    with pytest.raises(ValueError, match="reference, portable, triton, flex, got 'cuda'"):
        q = torch.ones(2, 1, 16)
        ops.attention(q, q, q, layout=SequenceLayout.from_lengths([2]), impl="cuda")
    with pytest.raises(RuntimeError, match="cross_entropy has no Triton form"):
        ops.cross_entropy(torch.ones(2, 3), torch.zeros(2, dtype=torch.int64), impl="triton")
