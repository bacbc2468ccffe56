"""The router's kernels in Triton's interpreter, in fp32 and fp16."""

import pytest
import torch

from nemotron_v3 import ops
from nemotron_v3.ops.router import cases
from tests.kernels.holding import hold
from tests.kernels.interpreter import mend_products

pytest.importorskip("triton")
pytestmark = pytest.mark.skipif(torch.cuda.is_available(), reason="tests/gpu runs them compiled")

F32, F16 = torch.float32, torch.float16


def by_name(name: str) -> cases.Case:
    return next(case for case in cases.CASES if case.name == name)


@pytest.mark.parametrize(
    ("name", "dtype"),
    [
        ("all-experts", F32),
        ("not-normalised", F16),
        ("grouped", F32),
        ("grouped-negative", F16),
        ("no-tokens", F32),
    ],
)
def test_accuracy(name, dtype):
    hold("router", by_name(name), dtype, "cpu")


def test_a_choice_of_22_among_512():
    """Beside the portable form, whose logits are the same numbers."""
    generator = torch.Generator().manual_seed(0)
    case = cases.Case("super", 5, 32, 512, 22, scaling_factor=5.0, bias=0.3)
    inputs = cases.make_inputs(case, F32, "cpu", generator)
    weights, indices = ops.router(**inputs.tensors, **inputs.options, impl="triton")
    expected, chosen = ops.router(**inputs.tensors, **inputs.options, impl="portable")
    assert torch.equal(indices, chosen)
    torch.testing.assert_close(weights, expected, rtol=1e-6, atol=0)


def test_ties_go_to_the_lower_index_and_no_expert_is_taken_twice():
    """Equal scores, infinite biases, and a group kept whose experts all stand at -inf."""
    x, weight = torch.ones(1, 4), torch.zeros(8, 4)
    bias = torch.tensor([0.0, 1.0, 0.0, 1.0, 0.0, 0.0, 0.0, 0.0])
    choose = ops.router(x, weight, bias, top_k=4, impl="triton")[1]
    assert choose.tolist() == [[1, 3, 0, 2]]
    bias = torch.tensor([-torch.inf] * 4 + [0.0] + [-torch.inf] * 3)
    assert ops.router(x, weight, bias, top_k=3, impl="triton")[1].tolist() == [[4, 0, 1]]
    groups = {"n_group": 2, "topk_group": 1, "impl": "triton"}
    bias[5] = 0.0
    assert ops.router(x, weight, bias, top_k=3, **groups)[1].tolist() == [[4, 5, 6]]
    # The two largest of a group decide, not all: 1 + 1 beats 1 + 0.9 + 0.9 + 0.9.
    bias = torch.tensor([1.0, 1.0, 0.0, 0.0, 1.0, 0.9, 0.9, 0.9])
    assert ops.router(x, weight, bias, top_k=3, **groups)[1].tolist() == [[0, 1, 2]]


@pytest.mark.parametrize("n_group", [1, 4])
def test_a_nan_logit_stays_in_its_row(n_group):
    x, weight, bias = torch.randn(5, 16), torch.randn(8, 16), torch.zeros(8)
    given = {"top_k": 3, "n_group": n_group, "topk_group": min(n_group, 2), "impl": "triton"}
    weights, indices = ops.router(x, weight, bias, **given)
    spoilt = x.clone()
    spoilt[2] = float("nan")
    found, chosen = ops.router(spoilt, weight, bias, **given)
    others = torch.arange(5) != 2
    assert found[2].isnan().all() and chosen.min() >= 0 and chosen.max() < 8
    assert chosen[2].unique().numel() == 3
    assert torch.equal(found[others], weights[others])
    assert torch.equal(chosen[others], indices[others])


def test_one_nan_among_the_logits_is_seen():
    """It is chosen before any number, whatever its sign bit, so that the weights show it."""
    x, weight, bias = torch.randn(3, 16), torch.randn(8, 16), torch.zeros(8)
    x[1, 0], weight[:, 0] = torch.inf, 1.0
    weight[5, 0] = 0.0
    weights, indices = ops.router(x, weight, bias, top_k=3, impl="triton")
    assert indices[1, 0] == 5 and weights[1].isnan().all()
    assert weights[[0, 2]].isfinite().all()


def test_a_token_is_routed_alike_whatever_stands_beside_it(monkeypatch):
    """Bit by bit, in 16 bits, whose logits are the op's own product."""
    mend_products(monkeypatch)
    inputs = cases.make_inputs(by_name("grouped"), F16, "cpu", torch.Generator().manual_seed(0))
    weights, indices = ops.router(**inputs.tensors, **inputs.options, impl="triton")
    inputs.tensors["x"] = inputs.tensors["x"][70:73]
    alone, chosen = ops.router(**inputs.tensors, **inputs.options, impl="triton")
    assert torch.equal(alone, weights[70:73]) and torch.equal(chosen, indices[70:73])


def test_what_kernels_cannot_do_is_refused():
    x, weight, bias = torch.ones(1, 4), torch.ones(66, 4), torch.zeros(66)
    with pytest.raises(RuntimeError, match="65 of 66 experts in 1 groups are asked for"):
        ops.router(x, weight, bias, top_k=65, impl="triton")
    with pytest.raises(RuntimeError, match="computes in fp32, and torch.float64"):
        ops.router(x.double(), weight.double(), bias, top_k=2, impl="triton")
