"""The ops of decoding on a GPU: every case in every dtype, Nano's sizes, inside a CUDA graph."""

from types import ModuleType
from typing import Any

import pytest
import torch

from nemotron_v3 import ops
from nemotron_v3.ops.decode_attention import cases as attention_cases
from nemotron_v3.ops.decode_mamba2 import cases as mamba2_cases
from tests.kernels.holding_decode import BUFFERS, hold, results

pytestmark = [
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU"),
    pytest.mark.heavy,
]

DTYPES = (torch.bfloat16, torch.float16, torch.float32)
MIXER = mamba2_cases.Case("nano", (3, -100, 0, 77, 1000), 64, 64, 8, 128)
HEADS = attention_cases.Case("nano", (3, -100, 0, 1977, 2040), 2048, 32, 2, 128)
LONG = attention_cases.Case("long", (40000,), 65536, 32, 2, 128)
STEPS = 6
EVERY = [
    pytest.param(op, case, dtype, id=f"{op}-{case.name}-{str(dtype)[6:]}")
    for op, cases in (
        ("decode_mamba2", (*mamba2_cases.CASES, MIXER)),
        ("decode_attention", (*attention_cases.CASES, HEADS, LONG)),
    )
    for case in cases
    for dtype in DTYPES
]


@pytest.mark.parametrize("impl", ["portable", "triton"])
@pytest.mark.parametrize(("op", "case", "dtype"), EVERY)
def test_accuracy(op, case, dtype, impl):
    hold(op, case, dtype, "cuda", impl)


@pytest.mark.parametrize("impl", ["portable", "triton"])
@pytest.mark.parametrize(
    ("op", "module", "case", "drawn"),
    [
        ("decode_mamba2", mamba2_cases, MIXER, "projected"),
        ("decode_attention", attention_cases, HEADS, "qkv"),
    ],
)
def test_a_graph_follows_its_tensors(op: str, module: ModuleType, case: Any, drawn: str, impl: str):
    """Replayed with other positions, other slots and other inputs: the bits of eager calls."""
    inputs = module.make_inputs(case, torch.bfloat16, "cuda", torch.Generator().manual_seed(0))
    given = inputs.tensors | inputs.options
    fixed, eager = (
        {k: t.clone() if isinstance(t, torch.Tensor) else t for k, t in given.items()}
        for _ in range(2)
    )
    results(op, inputs, impl)  # compiled before the capture
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        out = getattr(ops, op)(**fixed, impl=impl)
    generator = torch.Generator("cuda").manual_seed(1)
    for _ in range(STEPS):
        x = torch.randn(given[drawn].shape, generator=generator, device="cuda")
        on = torch.rand(len(case.held), generator=generator, device="cuda") < 0.7
        for arguments in (fixed, eager):
            arguments[drawn].copy_(x)
            arguments["active"].copy_(on)
        graph.replay()
        assert torch.equal(out, getattr(ops, op)(**eager, impl=impl))
        assert all(torch.equal(fixed[name], eager[name]) for name in BUFFERS[op])
        for arguments in (fixed, eager):
            arguments["positions"] += on
