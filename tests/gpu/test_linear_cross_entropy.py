"""Linear cross entropy on a GPU: the rule, many chunks, memory, graphs, no host sync."""

import pytest
import torch

from nemotron_v3 import ops
from nemotron_v3.ops.linear_cross_entropy import _chunks, cases
from tests.kernels.holding_loss import hold_log_probabilities, hold_loss

pytestmark = [
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU"),
    pytest.mark.heavy,
]

BF16 = torch.bfloat16
# More columns than a block, so that the gradient falls on logits of other blocks of the row.
LONG = cases.Case("long-rows", 33, 64, 50001, ignored=0.2, z_loss=1e-3)


@pytest.mark.parametrize("dtype", [BF16, torch.float16, torch.float32], ids=str)
@pytest.mark.parametrize("case", (*cases.CASES, LONG), ids=lambda case: case.name)
def test_loss(case, dtype):
    hold_loss(case, dtype, "cuda")


@pytest.mark.parametrize("dtype", [BF16, torch.float32], ids=str)
@pytest.mark.parametrize("case", (cases.CASES[1], LONG), ids=lambda case: case.name)
def test_log_probabilities(case, dtype):
    hold_log_probabilities(case, dtype, "cuda")


@pytest.mark.parametrize("rows", [128, 256])
def test_many_chunks(rows, monkeypatch):
    """Added up in fp32, or in the weight's dtype, by the rule."""
    monkeypatch.setattr(_chunks, "BYTES", rows * 264 * 4)
    hold_log_probabilities(cases.Case("chunks", 1100, 64, 264), BF16, "cuda")


def drawn(T, D, V):
    generator = torch.Generator("cuda").manual_seed(0)
    hidden = torch.randn(T, D, device="cuda", generator=generator).to(BF16).requires_grad_()
    weight = torch.randn(V, D, device="cuda", generator=generator) * D**-0.5
    targets = torch.randint(V, (T,), device="cuda", generator=generator)
    return hidden, weight.to(BF16).requires_grad_(), targets


def step(hidden, weight, targets):
    loss = ops.linear_cross_entropy(hidden, weight, targets, impl="triton")
    return loss.detach(), *torch.autograd.grad(loss, (hidden, weight))


def test_bit_identical_over_runs_without_a_host_sync_and_in_a_graph(monkeypatch):
    monkeypatch.setattr(_chunks, "BYTES", 256 * 50000 * 2)
    given = drawn(1000, 128, 50000)
    expected = step(*given)
    torch.cuda.set_sync_debug_mode("error")
    try:
        again = step(*given)
    finally:
        torch.cuda.set_sync_debug_mode("default")
    assert all(torch.equal(a, b) for a, b in zip(expected, again, strict=True))
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        captured = step(*given)
    for tensor in captured:
        tensor.fill_(float("nan"))
    graph.replay()
    assert all(torch.equal(a, b) for a, b in zip(expected, captured, strict=True))


def test_memory_beyond_the_weight_gradient():
    """At 8192 x 2688 x 131072: 1.1 GiB, where the logits alone would be 2 in bf16, 4 in fp32."""
    given = drawn(8192, 2688, 131072)
    step(*given)
    torch.cuda.synchronize()
    torch.cuda.reset_peak_memory_stats()
    before = torch.cuda.memory_allocated()
    step(*given)
    peak = torch.cuda.max_memory_allocated() - before - given[1].nbytes
    assert peak <= 1.1 * 2**30, f"{peak / 2**30:.2f} GiB"
