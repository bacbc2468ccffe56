"""Experts with low-rank updates: the rule, equality with merged stacks, exact merging."""

from functools import partial

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

from nemotron_v3 import ops
from nemotron_v3.ops.grouped_low_rank import cases, portable, reference
from tests.accuracy import PlainPyTorch, check, relative_error

STACKS, UPDATES = ("up_proj", "down_proj"), ("up_a", "up_b", "down_a", "down_b")


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("case", cases.CASES, ids=lambda case: case.name)
def test_accuracy(case, dtype):
    check(
        partial(ops.grouped_low_rank, impl="portable"),
        reference.grouped_low_rank,
        lambda generator: cases.make_inputs(case, dtype, "cpu", generator),
        dtype=dtype,
        plain=PlainPyTorch(reference.grouped_low_rank, dtype, results=True),
    )


def test_grouped_products_meet_the_rule_too(monkeypatch):
    """The GPU's path, on a CPU: PyTorch has a grouped product there as well."""
    monkeypatch.setattr(portable, "_takes_grouped", lambda x, stacks: True)
    test_accuracy(cases.CASES[2], torch.bfloat16)  # widths and rank are multiples of 8


def drawn(dtype=torch.float64, case=cases.CASES[2]):
    inputs = cases.make_inputs(case, dtype, "cpu", torch.Generator().manual_seed(0))
    return {k: t.detach().requires_grad_() for k, t in inputs.tensors.items()}, inputs.options


@pytest.mark.parametrize("impl", ["reference", "portable"])
def test_it_is_the_experts_with_updated_stacks(impl):
    """Through `experts` of `W + scale B A` and autograd: output and every gradient."""
    leaves, options = drawn()
    scale, indices = options["scale"], options["indices"]
    up, down = (
        leaves[f"{n}_proj"] + scale * leaves[f"{n}_b"] @ leaves[f"{n}_a"] for n in ("up", "down")
    )
    expected = ops.experts(leaves["x"], indices, leaves["weights"], up, down, impl="portable")
    measured = ops.grouped_low_rank(**leaves, **options, impl=impl)
    assert relative_error(measured, expected) < 1e-13
    dy = torch.randn_like(expected)
    gradients = (torch.autograd.grad(y, list(leaves.values()), dy) for y in (measured, expected))
    for name, a, b in zip(leaves, *gradients, strict=True):
        assert relative_error(a, b) < 1e-12, name


def test_a_fresh_update_changes_nothing():
    leaves, options = drawn(torch.float32)
    with torch.no_grad():
        leaves["up_b"].zero_()
        leaves["down_b"].zero_()
    y = ops.grouped_low_rank(**leaves, **options)
    names = ("x", "weights", *STACKS)
    alone = ops.experts(**{n: leaves[n] for n in names}, indices=options["indices"])
    torch.testing.assert_close(y, alone)


class Made(TorchDispatchMode):
    """Shapes of the matrices that products make."""

    def __init__(self):
        super().__init__()
        self.shapes = set()

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        out = func(*args, **(kwargs or {}))
        if func.overloadpacket in (torch.ops.aten.mm, torch.ops.aten.addmm, torch.ops.aten.bmm):
            self.shapes.add(tuple(out.shape[-2:]))
        return out


def transposes(shapes):
    return {pair for s in shapes for pair in (s, s[::-1])}


def test_frozen_stacks_cost_no_gradient():
    for frozen in (True, False):
        leaves, options = drawn(case=cases.CASES[3])
        for name in STACKS:
            leaves[name].requires_grad_(not frozen)
        with Made() as made:
            y = ops.grouped_low_rank(**leaves, **options)
            torch.autograd.grad(y.sum(), [t for t in leaves.values() if t.requires_grad])
        of_stacks = {tuple(leaves[n].shape[1:]) for n in STACKS}
        of_updates = {tuple(leaves[n].shape[1:]) for n in UPDATES}
        assert bool(transposes(of_stacks) & made.shapes) != frozen
        assert transposes(of_updates) & made.shapes


def test_ranks_may_differ():
    leaves, options = drawn()
    with torch.no_grad():
        for name in ("down_a", "down_b"):
            dim = 1 if name == "down_a" else 2
            leaves[name] = leaves[name].narrow(dim, 0, 3).clone()
    a, b = (ops.grouped_low_rank(**leaves, **options, impl=i) for i in ("portable", "reference"))
    assert relative_error(a, b) < 1e-13


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
def test_a_merge_is_rounded_once_and_undone_bit_for_bit(dtype):
    leaves, _ = drawn(dtype)
    weight, a, b = (leaves[n] for n in ("up_proj", "up_a", "up_b"))
    before = weight.detach().clone()
    base = ops.merge_low_rank_(weight, a, b, scale=0.7, keep_on="cpu")
    true = before.double() + 0.7 * b.double() @ a.double()
    roundoff = torch.finfo(dtype).eps / 2
    # One rounding of the sum; in fp32 the product has roundings of its own.
    assert relative_error(weight, true) <= (8 if dtype == torch.float32 else 1) * roundoff
    subtracted = (weight.detach() - 0.7 * (b @ a).detach()).to(dtype)
    assert not torch.equal(subtracted, before)  # what undoing by arithmetic would give
    ops.unmerge_low_rank_(weight, base)
    assert torch.equal(weight, before) and base.data_ptr() != weight.data_ptr()


def test_a_merged_stack_gives_the_same_output():
    leaves, options = drawn()
    with torch.no_grad():
        expected = ops.grouped_low_rank(**leaves, **options)
        for n in ("up", "down"):
            parts = (leaves[f"{n}_{part}"] for part in ("proj", "a", "b"))
            ops.merge_low_rank_(*parts, scale=options["scale"])
        names = ("x", "weights", *STACKS)
        merged = ops.experts(**{n: leaves[n] for n in names}, indices=options["indices"])
    assert relative_error(merged, expected) < 1e-13


def test_bad_shapes_are_refused_and_nothing_is_changed():
    leaves, options = drawn()
    with pytest.raises(ValueError, match=r"up_proj .* its update a \(16, 8, 24\)"):
        ops.grouped_low_rank(**(leaves | {"up_a": leaves["down_a"]}), **options)
    with pytest.raises(ValueError, match=r"indices \(65, 2\)"):
        ops.grouped_low_rank(**leaves, **(options | {"indices": options["indices"][:, :2]}))
    weight = leaves["up_proj"]
    before = weight.detach().clone()
    with pytest.raises(ValueError, match="do not fit"):
        ops.merge_low_rank_(weight, leaves["up_b"], leaves["up_a"])
    with pytest.raises(ValueError, match="not of one merge"):
        ops.unmerge_low_rank_(weight, leaves["down_proj"])
    assert torch.equal(weight, before)
