"""The Triton forms on a GPU: every case in every dtype, determinism, indices past 2^31, graphs."""

import pytest
import torch

from nemotron_v3 import ops
from nemotron_v3.layout import SequenceLayout
from nemotron_v3.ops.causal_conv1d import cases as conv_cases
from nemotron_v3.ops.gated_rms_norm import cases as gated_cases
from nemotron_v3.ops.mamba2 import cases as mamba2_cases
from nemotron_v3.ops.rms_norm import cases as norm_cases
from nemotron_v3.ops.ssd import cases as ssd_cases
from tests.accuracy import relative_error
from tests.kernels.holding import hold, results

pytestmark = [
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU"),
    pytest.mark.heavy,
]

DTYPES = (torch.bfloat16, torch.float16, torch.float32)
SHAPES = tuple(
    ssd_cases.Case(f"p{p}-n{n}", (200, 1, 64), 6, p, 2, n, initial_states=True)
    for p in (64, 80)
    for n in (16, 32, 64, 128)
)
EVERY = [
    pytest.param(op, case, dtype, id=f"{op}-{case.name}-{str(dtype)[6:]}")
    for op, cases in (
        ("rms_norm", norm_cases.CASES),
        ("gated_rms_norm", gated_cases.CASES),
        ("causal_conv1d", conv_cases.CASES),
        ("ssd", ssd_cases.CASES + SHAPES),
        ("mamba2", mamba2_cases.CASES),
    )
    for case in cases
    for dtype in DTYPES
]


@pytest.mark.parametrize(("op", "case", "dtype"), EVERY)
def test_accuracy(op, case, dtype):
    hold(op, case, dtype, "cuda")


def test_gradients_are_bit_identical_over_runs():
    case = mamba2_cases.Case("nano", (700, 300), 64, 64, 8, 128)
    inputs = mamba2_cases.make_inputs(
        case, torch.bfloat16, "cuda", torch.Generator().manual_seed(0)
    )
    first, second = results("mamba2", inputs), results("mamba2", inputs)
    assert all(torch.equal(a, b) for a, b in zip(first, second, strict=True))


def test_extreme_steps_stay_finite():
    """dt at its limits, A from nothing to -1e4."""
    case = ssd_cases.Case("extreme", (300,), 8, 64, 1, 64, initial_states=True)
    inputs = ssd_cases.make_inputs(case, torch.bfloat16, "cuda", torch.Generator().manual_seed(0))
    inputs.tensors["A"] = -torch.logspace(-6, 4, 8, device="cuda")
    inputs.tensors["dt"] = inputs.tensors["dt"] * 30
    assert all(torch.isfinite(result).all() for result in results("ssd", inputs))


@pytest.mark.parametrize("op", ["rms_norm", "causal_conv1d"])
def test_past_two_to_the_31_elements(op):
    """The last rows of a tensor of more than 2^31 elements equal the same rows alone."""
    T, C = 2**20 + 100, 2048
    x = torch.randn(T, C, device="cuda", dtype=torch.bfloat16)
    if op == "rms_norm":
        weight = torch.randn(C, device="cuda")
        whole = ops.rms_norm(x, weight, impl="triton")[-64:]
        alone = ops.rms_norm(x[-64:].clone(), weight, impl="triton")
    else:
        weight = torch.randn(C, 4, device="cuda")
        layout = SequenceLayout.from_lengths([T - 64, 64], "cuda")
        whole, _ = ops.causal_conv1d(x, weight, None, layout=layout, impl="triton")
        last = SequenceLayout.from_lengths([64], "cuda")
        alone, _ = ops.causal_conv1d(x[-64:].clone(), weight, None, layout=last, impl="triton")
        whole = whole[-64:]
    assert torch.equal(whole, alone)


def test_core_past_two_to_the_31_elements():
    """A quarter of a million tokens of the mixer's core: the last document as if alone."""
    case = mamba2_cases.Case("long", (2**18 - 200, 200), 64, 64, 8, 128)
    generator = torch.Generator().manual_seed(0)
    small = mamba2_cases.make_inputs(
        mamba2_cases.Case("last", (200,), 64, 64, 8, 128), torch.bfloat16, "cuda", generator
    )
    width = small.tensors["zxbcdt"].shape[1]
    wide = torch.randn(sum(case.lengths), width, device="cuda", dtype=torch.bfloat16)
    assert wide.numel() > 2**31
    wide[-200:] = small.tensors["zxbcdt"]
    alone = ops.mamba2(**small.tensors, **small.options, impl="triton")[0]
    small.tensors["zxbcdt"] = wide
    small.options["layout"] = SequenceLayout.from_lengths(case.lengths, "cuda")
    assert torch.equal(ops.mamba2(**small.tensors, **small.options, impl="triton")[0][-200:], alone)


def test_graph_replay_equals_eager():
    case = mamba2_cases.Case("nano", (256,), 8, 64, 1, 128)
    inputs = mamba2_cases.make_inputs(
        case, torch.bfloat16, "cuda", torch.Generator().manual_seed(0)
    )
    eager = ops.mamba2(**inputs.tensors, **inputs.options, impl="triton")[0]
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        y = ops.mamba2(**inputs.tensors, **inputs.options, impl="triton")[0]
    y.fill_(float("nan"))
    graph.replay()
    assert torch.equal(y, eager)


def test_auto_takes_the_kernels_and_portable_agrees():
    case = mamba2_cases.Case("pack", (130, 1, 40), 8, 64, 2, 64)
    inputs = mamba2_cases.make_inputs(case, torch.float32, "cuda", torch.Generator().manual_seed(0))
    kernels = results("mamba2", inputs, impl="auto")
    for ours, theirs in zip(kernels, results("mamba2", inputs, impl="portable"), strict=True):
        assert relative_error(ours, theirs) < 1e-4
