"""The accuracy rule itself: it lets rounding pass, and nothing else."""

import re
from functools import partial

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from nemotron_v3.layout import SequenceLayout
from nemotron_v3.ops.common.cases import Inputs
from nemotron_v3.ops.rms_norm.reference import rms_norm
from nemotron_v3.ops.ssd.cases import Case, make_inputs
from nemotron_v3.ops.ssd.reference import ssd
from tests.accuracy import (
    PlainPyTorch,
    RoundedProducts,
    check,
    layouts,
    padding_masks,
    poison_empty,
    relative_error,
)

CASE = Case("pack", (9, 1, 30), 32, 4, 2, 16, initial_states=True)
LONG = Case("long", (300,), 64, 4, 2, 16, decay="long")


def run_ssd(function, case=CASE, dtype=torch.float32):
    return check(function, ssd, partial(make_inputs_of, case, dtype), dtype=dtype)


def make_inputs_of(case, dtype, generator):
    return make_inputs(case, dtype, "cpu", generator)


def exact(**arguments):
    """ssd as well as fp64 can do it, in the dtypes an op returns."""
    y, states = ssd(**arguments)
    return y.to(arguments["x"].dtype), states.float()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_rounding_passes(dtype):
    report = run_ssd(exact, dtype=dtype)
    assert set(report.rows) == {"output 0", "output 1"} | {
        f"grad {name}" for name in ("x", "dt", "A", "B", "C", "D", "dt_bias", "initial_states")
    }
    assert report.draws == 2  # A, D and dt_bias have 32 elements, and 64 are wanted


def across_borders(layout, **arguments):
    lengths = (layout.num_tokens, *[0] * (layout.num_documents - 1))
    return exact(**arguments, layout=SequenceLayout.from_lengths(lengths))


def steps_without_softplus(dt, dt_bias, **arguments):
    return exact(dt=(dt + dt_bias).clamp(min=0.0), **arguments)


def heads_share_groups_in_turn(B, C, **arguments):
    return exact(B=B.repeat(1, 16, 1), C=C.repeat(1, 16, 1), **arguments)


def without_initial_states(initial_states, **arguments):
    return exact(**arguments)


def skip_gradient_lost(D, **arguments):
    return exact(D=D.detach(), **arguments)


def two_percent(x, **arguments):
    y, states = exact(x=x, **arguments)
    return y + 0.02 * (y - y.detach()), states


@pytest.mark.parametrize(
    "fault",
    [
        across_borders,
        steps_without_softplus,
        heads_share_groups_in_turn,
        without_initial_states,
        skip_gradient_lost,
        two_percent,
    ],
)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_fault_is_found(fault, dtype):
    with pytest.raises(AssertionError, match="less accurate than allowed"):
        run_ssd(fault, dtype=dtype)


def state_kept_in_bf16(layout, initial_states, **arguments):
    """One token after another, the state stored in bf16 in between."""
    tokens = {k: arguments.pop(k) for k in ("x", "dt", "B", "C")}
    S = torch.zeros(1, 64, 4, 16)
    outputs = []
    for t in range(layout.num_tokens):
        now = {k: v[t : t + 1] for k, v in tokens.items()}
        one = SequenceLayout.from_lengths((1,))
        y_t, S = exact(**now, **arguments, layout=one, initial_states=S.bfloat16())
        outputs.append(y_t)
    return torch.cat(outputs), S


def test_a_narrow_state_is_found_in_bf16():
    with pytest.raises(AssertionError, match="less accurate than allowed.*output 1"):
        run_ssd(state_kept_in_bf16, LONG, torch.bfloat16)


def norm_inputs(generator):
    x = torch.randn(5, 8, generator=generator)
    return Inputs({"x": x, "weight": torch.ones(8)})


def run_norm(function):
    return check(function, rms_norm, norm_inputs, dtype=torch.float32)


def test_memory_that_nobody_wrote_is_found():
    def last_row_missing(x, weight):
        y = torch.empty_like(x)
        y[:-1] = rms_norm(x[:-1], weight, dtype=torch.float32)
        return y

    with pytest.raises(AssertionError, match="output.*nan"):
        run_norm(last_row_missing)


def test_a_changed_input_is_found():
    def in_place(x, weight):
        y = rms_norm(x, weight, dtype=torch.float32)
        x.data.zero_()
        return y

    with pytest.raises(AssertionError, match="the function changed its input x"):
        run_norm(in_place)


def test_a_failure_shows_a_table():
    with pytest.raises(AssertionError) as failure:
        run_norm(lambda x, weight: 1.5 * rms_norm(x, weight, dtype=torch.float32))
    text = str(failure.value)
    assert re.search(r"tensor +shape +dtype +error +allowed +ratio", text)
    assert re.search(r"output +\(5, 8\) +float32 +5\.00e-01 .*<-- too large", text)


def test_fp64_cannot_be_held_to_itself():
    with pytest.raises(ValueError, match="the truth is float64 itself"):
        check(rms_norm, rms_norm, norm_inputs, dtype=torch.float64)


def test_plain_pytorch_is_a_rounded_matmul_in_both_directions():
    """Against PyTorch's own bf16 product: the same operands, and results where asked for."""
    a, b = torch.randn(7, 300), torch.randn(300, 5)
    grad = torch.randn(7, 5).bfloat16()
    own_a, own_b = (u.bfloat16().requires_grad_() for u in (a, b))
    own = own_a @ own_b
    own_gradients = torch.autograd.grad(own, (own_a, own_b), grad)
    for results in (False, True):
        leaves = a.clone().requires_grad_(), b.clone().requires_grad_()
        plain = PlainPyTorch(lambda a, b, dtype: a @ b, torch.bfloat16, results=results)
        with plain.products():
            product = plain(a=leaves[0], b=leaves[1])
            gradients = torch.autograd.grad(product, leaves, grad.float())
        assert torch.equal(product.bfloat16(), product) == results
        for got, expected in zip((product, *gradients), (own, *own_gradients), strict=True):
            assert relative_error(got.bfloat16(), expected) < 1e-3  # sums in another order


def test_only_products_are_rounded():
    x = torch.randn(4, 4)
    with RoundedProducts(torch.bfloat16):
        assert torch.equal(x * x, torch.mul(x, x))
        assert torch.equal(x + x, 2 * x)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.int64, torch.bool])
def test_allocations_are_poisoned_and_restored(dtype):
    before = torch.empty, torch.Tensor.new_empty
    like = torch.zeros(3, dtype=dtype)
    with poison_empty():
        made = [
            torch.empty(3, dtype=dtype),
            torch.empty_like(like),
            torch.empty_strided((3,), (2,), dtype=dtype),
            like.new_empty(3),
            like.new_empty_strided((3,), (2,)),
        ]
    for tensor in made:
        bad = tensor.isnan() if dtype.is_floating_point else tensor != 0
        assert bad.all()
    assert (torch.empty, torch.Tensor.new_empty) == before


def test_relative_error():
    true = torch.tensor([3.0, 4.0])
    assert relative_error(true, true) == 0.0
    assert relative_error(torch.tensor([3.0, 4.5]), true) == pytest.approx(0.1)
    assert relative_error(torch.tensor([0.0, 2.0]), torch.zeros(2)) == 2.0
    with pytest.raises(AssertionError, match=re.escape("(2,) != (3,)")):
        relative_error(true, torch.zeros(3))


@settings(max_examples=50)
@given(layouts(allow_empty=True))
def test_layouts_hold_tokens(layout):
    assert layout.num_tokens > 0
    x = torch.randn(*layout.shape)
    assert torch.equal(layout.pack(layout.unpack(layout.pack(x))), layout.pack(x))


@settings(max_examples=50)
@given(st.data(), st.sampled_from(["left", "right", "mixed"]))
def test_padding_is_on_its_side(data, side):
    mask = data.draw(padding_masks(side=side))
    assert (mask.sum(1) > 0).all()
    steps = mask.diff(dim=1)  # +1 where a row's tokens begin, -1 after they end
    if side == "left":
        assert (steps >= 0).all()
    if side == "right":
        assert (steps <= 0).all()
    assert ((steps == 1).sum(1) <= 1).all() and ((steps == -1).sum(1) <= 1).all()
