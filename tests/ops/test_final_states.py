"""The scans without their final states."""

import pytest
import torch

from nemotron_v3 import ops
from nemotron_v3.ops.mamba2 import cases as mamba2_cases
from nemotron_v3.ops.ssd import cases as ssd_cases

CASES = {
    "ssd": (ssd_cases, ssd_cases.Case("pack", (1, 0, 70), 2, 16, 1, 16, initial_states=True)),
    "mamba2": (mamba2_cases, mamba2_cases.Case("pack", (1, 0, 6), 2, 16, 1, 16, states=True)),
}


@pytest.mark.parametrize(
    "impl", ["reference", "portable", pytest.param("triton", marks=pytest.mark.heavy)]
)
@pytest.mark.parametrize("op", CASES)
def test_the_rest_is_the_same_bit_by_bit(op, impl):
    if impl == "triton":
        pytest.importorskip("triton")
    cases, case = CASES[op]
    device = "cuda" if impl == "triton" and torch.cuda.is_available() else "cpu"
    inputs = cases.make_inputs(case, torch.float32, device, torch.Generator().manual_seed(0))
    found = []
    for wanted in (True, False):
        leaves = {k: t.detach().requires_grad_() for k, t in inputs.tensors.items()}
        results = getattr(ops, op)(
            **leaves, **inputs.options, return_final_states=wanted, impl=impl
        )
        assert all((state is not None) is wanted for state in results[1:])
        y = results[0]
        gradients = torch.autograd.grad(y, list(leaves.values()), torch.ones_like(y))
        found.append([y, *gradients])
    assert all(torch.equal(a, b) for a, b in zip(*found, strict=True))


@pytest.mark.parametrize("op", CASES)
def test_initial_states_of_the_scan_are_not_kept_for_the_backward_pass(op):
    """Of them it needs to know that they are there."""
    cases, case = CASES[op]
    inputs = cases.make_inputs(case, torch.float32, "cpu", torch.Generator().manual_seed(0))
    leaves = {k: t.detach().requires_grad_() for k, t in inputs.tensors.items()}
    states = leaves["initial_states" if op == "ssd" else "ssm_states"]
    kept = []
    with torch.autograd.graph.saved_tensors_hooks(lambda t: kept.append(t) or t, lambda t: t):
        y = getattr(ops, op)(**leaves, **inputs.options, impl="portable")[0]
    assert kept and states.data_ptr() not in [t.data_ptr() for t in kept]
    (gradient,) = torch.autograd.grad(y, states, torch.ones_like(y))
    assert gradient.shape == states.shape and gradient.dtype == states.dtype and gradient.any()
