"""A form that is wrong on a device raises at its first use there; a right one is checked once."""

import pytest
import torch
from torch._subclasses.fake_tensor import FakeTensorMode

from nemotron_v3.ops.common import selfcheck
from nemotron_v3.ops.registry import OPS, Op
from nemotron_v3.ops.rms_norm import portable, reference
from tests.models import tiny_model

DTYPES = (torch.float64, torch.float32, torch.bfloat16, torch.float16)
CPU = torch.device("cpu")


CHECKED = sorted(name for name, op in OPS.items() if op.check is not None)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("op", CHECKED)
def test_a_right_form_has_room_to_its_bound(op, dtype):
    errors = selfcheck.measure(OPS[op], "portable", OPS[op].portable, CPU, dtype)
    decodes = op in ("mamba2_step", "cached_attention")
    assert any(name.startswith("gradient") for name in errors) != decodes
    assert max(errors.values()) <= selfcheck.explained_by_rounding(dtype, CPU) / 2


WRONG = {
    "scaled": lambda y: y * 1.05,
    "one element is not a number": lambda y: y.index_fill(-1, torch.tensor([0]), torch.nan),
    "one row is zero": lambda y: y.index_fill(0, torch.tensor([1]), 0),
    "wrong backward": lambda y: y.detach() + 0.9 * (y - y.detach()),
}


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("wrong", WRONG)
def test_a_wrong_form_raises_at_every_call_instead_of_computing(wrong, dtype):
    def broken(*args, **kwargs):
        return WRONG[wrong](portable.rms_norm(*args, **kwargs))

    op = fresh(broken)
    x, weight = torch.randn(2, 8, dtype=dtype), torch.ones(8, dtype=dtype)
    for _ in range(2):
        with pytest.raises(RuntimeError, match="rms_norm: the portable form computes wrong number"):
            op.pick("auto", (x, weight), 8)


def counted(monkeypatch) -> list[torch.dtype]:
    """The dtypes of all checks from now on, of a form nobody has used yet."""
    seen = []
    check = selfcheck.check

    def count(*args):
        seen.append(args[4])
        check(*args)

    monkeypatch.setattr(selfcheck, "check", count)
    return seen


def fresh(form=portable.rms_norm) -> Op:
    return Op("rms_norm", reference.rms_norm, form, check=OPS["rms_norm"].check)


def called(op: Op, x: torch.Tensor, weight: torch.Tensor) -> torch.Tensor:
    return op.pick("auto", (x, weight), len(weight))(x, weight)


def test_each_dtype_is_checked_once(monkeypatch):
    seen, op = counted(monkeypatch), fresh()
    for dtype in (torch.float32, torch.bfloat16, torch.float32, torch.bfloat16):
        x, weight = torch.randn(2, 8, dtype=dtype), torch.ones(8, dtype=dtype)
        assert torch.equal(called(op, x, weight), portable.rms_norm(x, weight))
    assert seen == [torch.float32, torch.bfloat16]


def test_a_form_is_checked_once_by_whatever_name_it_is_asked_for(monkeypatch):
    seen, op = counted(monkeypatch), fresh()
    given = torch.ones(2, 8), torch.ones(8)
    for impl in ("auto", "portable", "auto"):
        assert op.pick(impl, given, 8) is portable.rms_norm
    assert op.pick("reference", given, 8) is reference.rms_norm  # the truth itself
    assert seen == [torch.float32]


def test_where_nothing_can_be_measured_the_check_waits(monkeypatch):
    seen, op = counted(monkeypatch), fresh()
    assert called(op, torch.empty(2, 8, device="meta"), torch.empty(8, device="meta")).is_meta
    with FakeTensorMode():
        called(op, torch.empty(2, 8), torch.empty(8))
    assert seen == []
    called(op, torch.randn(2, 8), torch.ones(8))
    assert seen == [torch.float32]


def test_a_check_sees_nothing_of_the_caller_and_leaves_nothing_behind(monkeypatch):
    """Inference mode, autocast, saved-tensor hooks and a default device; the random state."""
    seen, saved = counted(monkeypatch), []
    x, weight = torch.randn(2, 8, requires_grad=True), torch.ones(8)
    state = torch.get_rng_state()
    with (
        torch.autograd.graph.saved_tensors_hooks(lambda t: saved.append(t.shape) or t, lambda t: t),
        torch.autocast("cpu", torch.bfloat16),
        torch.device("meta"),
    ):
        called(fresh(), x, weight)
    with torch.inference_mode():
        called(fresh(), x, weight)
    assert len(seen) == 2
    assert torch.equal(torch.get_rng_state(), state)
    assert {shape[-1] for shape in saved} <= {1, 8}


def test_a_compiled_layer_holds_no_check():
    """One graph without a break, and the numbers of the eager layer."""
    norm = tiny_model("M").model.norm_f
    x = torch.randn(1, 9, 48)
    compiled = torch.compile(norm, backend="eager", fullgraph=True)
    assert torch.equal(compiled(x), norm(x))
