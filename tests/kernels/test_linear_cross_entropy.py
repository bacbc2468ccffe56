"""The Triton form of linear cross entropy in Triton's interpreter, in fp32 and fp16."""

import pytest
import torch

from nemotron_v3 import ops
from nemotron_v3.ops.linear_cross_entropy import _chunks, cases
from tests.kernels.holding_loss import hold_log_probabilities, hold_loss

pytest.importorskip("triton")
pytestmark = pytest.mark.skipif(torch.cuda.is_available(), reason="tests/gpu runs them compiled")

F32, F16 = torch.float32, torch.float16
CASES = (
    cases.Case("odd", 9, 16, 331, ignored=0.3, z_loss=1e-2, strided=True),
    cases.Case("large-logits", 5, 24, 128, scale=20.0),
    cases.Case("none-left", 3, 8, 33, ignored=1.0),
    cases.Case("no-tokens", 0, 8, 33),
)


@pytest.fixture(autouse=True)
def _small_blocks_and_chunks(monkeypatch):
    """Three blocks of columns a row, and several chunks of tokens."""
    from nemotron_v3.ops.linear_cross_entropy import kernels

    monkeypatch.setattr(kernels, "_blocks", lambda V: (128, 1))
    monkeypatch.setattr(_chunks, "ROWS", 4)
    monkeypatch.setattr(_chunks, "CPU_BYTES", 4 * 331 * 4)


@pytest.mark.parametrize("dtype", [F32, pytest.param(F16, marks=pytest.mark.heavy)], ids=str)
@pytest.mark.parametrize("case", CASES, ids=lambda case: case.name)
def test_loss(case, dtype):
    hold_loss(case, dtype, "cpu")


@pytest.mark.parametrize("dtype", [F32, F16], ids=str)
def test_log_probabilities(dtype):
    hold_log_probabilities(CASES[0], dtype, "cpu")


def drawn(dtype=F32):
    inputs = cases.make_inputs(CASES[0], dtype, "cpu", torch.Generator().manual_seed(0))
    leaves = [t.detach().requires_grad_() for t in inputs.tensors.values()]
    return leaves, inputs.options["targets"]


@pytest.mark.parametrize("name", ["linear_cross_entropy", "linear_log_probabilities"])
def test_compiled_graph_equals_eager(name):
    leaves, targets = drawn()

    def loss(hidden, weight):
        out = getattr(ops, name)(hidden, weight, targets, impl="triton")
        return out if isinstance(out, torch.Tensor) else (out[0] * out[1]).sum()

    compiled = torch.compile(loss, backend="aot_eager", fullgraph=True)
    results = [(x, *torch.autograd.grad(x, leaves)) for x in (loss(*leaves), compiled(*leaves))]
    assert all(torch.equal(a, b) for a, b in zip(*results, strict=True))


@pytest.mark.parametrize("dtype", [F32, F16], ids=str)
def test_repeated_backward_passes_do_not_disturb_each_other(dtype):
    """The last pass over a graph may give away what was saved for it, the others may not."""
    leaves, targets = drawn(dtype)
    loss = ops.linear_cross_entropy(*leaves, targets, impl="triton")
    once = torch.autograd.grad(loss, leaves, retain_graph=True)
    kept = [g.clone() for g in once]
    halves = torch.autograd.grad(loss, leaves, torch.tensor(0.5), retain_graph=True)
    last = torch.autograd.grad(loss, leaves, torch.tensor(0.25))
    for whole, before, half, quarter in zip(once, kept, halves, last, strict=True):
        assert torch.equal(whole, before)
        torch.testing.assert_close(half * 2, whole)
        torch.testing.assert_close(quarter * 4, whole, rtol=2e-3, atol=1e-6)


def test_only_wanted_gradients():
    (hidden, weight), targets = drawn(F16)
    both = ops.linear_cross_entropy(hidden, weight, targets, impl="triton")
    expected = torch.autograd.grad(both, (hidden, weight))
    for i, given in enumerate([(hidden, weight.detach()), (hidden.detach(), weight)]):
        loss = ops.linear_cross_entropy(*given, targets, impl="triton")
        assert torch.equal(loss, both)
        (gradient,) = torch.autograd.grad(loss, given[i])
        assert torch.equal(gradient, expected[i])
    with torch.no_grad():
        out = ops.linear_cross_entropy(hidden, weight, targets, per_token=True, impl="triton")
    assert torch.equal(out.loss, both) and not out.loss.requires_grad


def test_a_target_outside_the_vocabulary_shows_as_nan():
    """Where nobody looks at the targets first, as on a GPU."""
    from nemotron_v3.ops.linear_cross_entropy import kernels

    (hidden, weight), targets = drawn()
    targets = targets.clamp(min=0)
    targets[2] = 331
    loss, log_p, _ = kernels.linear_cross_entropy(hidden, weight, targets, per_token=True)
    assert loss.isnan() and log_p.isnan().nonzero().tolist() == [[2]]


def test_what_it_cannot_do_is_refused():
    with pytest.raises(RuntimeError, match="computes in fp32, and torch.float64"):
        ops.linear_cross_entropy(
            torch.ones(2, 4).double(),
            torch.ones(3, 4).double(),
            torch.zeros(2).long(),
            impl="triton",
        )
