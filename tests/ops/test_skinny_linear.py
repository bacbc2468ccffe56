"""Projections of a few rows: the rule, and what is refused."""

import pytest
import torch

from nemotron_v3 import ops
from nemotron_v3.ops.skinny_linear import Norm, cases
from tests.kernels.holding_products import hold_linear

F32 = torch.float32


@pytest.mark.parametrize("dtype", [F32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("case", cases.CASES, ids=lambda case: case.name)
def test_portable(case, dtype):
    hold_linear(case, dtype, "cpu", "portable")


def test_it_is_the_norm_and_the_layers_one_after_another():
    x, gain = torch.randn(3, 8, dtype=torch.float64), torch.randn(8, dtype=torch.float64)
    w = [torch.randn(m, 8, dtype=torch.float64) for m in (4, 2)]
    stream = torch.randn(3, 6, dtype=torch.float64)
    expected = stream + torch.cat(
        [ops.gated_rms_norm(x, None, gain, 4, eps=1e-3, impl="portable") @ w_i.T for w_i in w], 1
    )
    for impl in ("portable", "reference"):
        out = stream.clone()
        ops.skinny_linear(x, *w, norm=Norm(gain, 1e-3, 4), residual=out, out=out, impl=impl)
        torch.testing.assert_close(out, expected)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"x": torch.ones(2, 3, 8)}, r"x \(2, 3, 8\) of strides"),
        ({"x": torch.ones(8, 3).T}, "neighbouring columns"),
        ({"weights": ()}, "0 weights: give one to 3"),
        ({"weights": (torch.ones(2, 8),) * 4}, "4 weights"),
        ({"weights": (torch.ones(6, 7),)}, r"a weight \(6, 7\) .* must be \(outputs, 8\)"),
        ({"weights": (torch.ones(4, 8), torch.ones(2, 8).half())}, "in torch.float16 must be"),
        ({"biases": (torch.ones(5),)}, r"biases of shapes \[\(5,\)\] do not fit weights of \[6\]"),
        ({"biases": (None, None)}, "give one a weight, or none"),
        ({"norm": Norm(torch.ones(7), 1e-5)}, r"a norm of weight \(7,\)"),
        ({"norm": Norm(torch.ones(8), 1e-5, 3)}, "groups of 3 does not fit 8 inputs"),
        ({"out": torch.ones(3, 5)}, r"out \(3, 5\) of strides .*\(3, 6\) with"),
        ({"residual": torch.ones(6, 3).T}, "must be laid out as out"),
    ],
)
def test_what_does_not_fit_is_refused(changes, message):
    arguments = {"x": torch.ones(3, 8), "weights": (torch.ones(6, 8),), "out": torch.ones(3, 6)}
    arguments |= changes
    with pytest.raises(ValueError, match=message):
        ops.skinny_linear(arguments.pop("x"), *arguments.pop("weights"), **arguments)


def test_a_result_over_its_own_inputs_is_refused():
    x = torch.ones(3, 6)
    with pytest.raises(ValueError, match="out is x"):
        ops.skinny_linear(x, torch.ones(6, 6), out=x)


def test_kernels_refuse_what_they_cannot_read():
    pytest.importorskip("triton")
    x, out = torch.ones(2, 8), torch.ones(2, 6)
    for weight, message in (
        (torch.ones(8, 6).T, "not contiguous"),
        (torch.ones(6, 8).double(), "torch.float64"),
    ):
        with pytest.raises(RuntimeError, match=message):
            ops.skinny_linear(x, weight, out=out, impl="triton")
