"""The ops of decoding on a GPU: every case in every dtype, Nano's sizes, inside a CUDA graph."""

import pytest
import torch

from nemotron_v3 import ops
from nemotron_v3.ops.decode_mamba2 import cases as mamba2_cases
from tests.kernels.holding_decode import hold, results

pytestmark = [
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU"),
    pytest.mark.heavy,
]

DTYPES = (torch.bfloat16, torch.float16, torch.float32)
NANO = mamba2_cases.Case("nano", (3, -100, 0, 77, 1000), 64, 64, 8, 128)
STEPS = 6
EVERY = [
    pytest.param(op, case, dtype, id=f"{op}-{case.name}-{str(dtype)[6:]}")
    for op, cases in (("decode_mamba2", (*mamba2_cases.CASES, NANO)),)
    for case in cases
    for dtype in DTYPES
]


@pytest.mark.parametrize("impl", ["portable", "triton"])
@pytest.mark.parametrize(("op", "case", "dtype"), EVERY)
def test_accuracy(op, case, dtype, impl):
    hold(op, case, dtype, "cuda", impl)


def drawn_mamba2():
    return mamba2_cases.make_inputs(NANO, torch.bfloat16, "cuda", torch.Generator().manual_seed(0))


@pytest.mark.parametrize("impl", ["portable", "triton"])
def test_a_graph_of_the_mixer_follows_its_tensors(impl):
    """Replayed with other positions, other slots and other inputs: the eager calls' bits."""
    inputs = drawn_mamba2()
    given = inputs.tensors | inputs.options
    fixed = {k: t.clone() if isinstance(t, torch.Tensor) else t for k, t in given.items()}
    eager = {k: t.clone() if isinstance(t, torch.Tensor) else t for k, t in given.items()}
    results("decode_mamba2", inputs, impl)  # compiled before the capture
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        out = ops.decode_mamba2(**fixed, impl=impl)
    for name in ("conv", "ssm"):
        fixed[name].copy_(given[name])
    generator = torch.Generator("cuda").manual_seed(1)
    for _ in range(STEPS):
        projected = torch.randn(given["projected"].shape, generator=generator, device="cuda")
        on = torch.rand(len(NANO.held), generator=generator, device="cuda") < 0.7
        for arguments in (fixed, eager):
            arguments["projected"].copy_(projected)
            arguments["active"].copy_(on)
        graph.replay()
        expected = ops.decode_mamba2(**eager, impl=impl)
        assert torch.equal(out, expected)
        assert all(torch.equal(fixed[name], eager[name]) for name in ("conv", "ssm"))
        for arguments in (fixed, eager):
            arguments["positions"] += on
