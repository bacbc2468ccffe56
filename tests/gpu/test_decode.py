"""The ops of decoding on a GPU: every case in every dtype, Nano's sizes, inside a CUDA graph."""

from types import ModuleType
from typing import Any

import pytest
import torch

from nemotron_v3 import ops
from nemotron_v3.ops.decode_attention import cases as attention_cases
from nemotron_v3.ops.decode_experts import cases as expert_cases
from nemotron_v3.ops.decode_mamba2 import cases as mamba2_cases
from nemotron_v3.ops.sampling import cases as sampling_cases
from nemotron_v3.ops.skinny_linear import cases as linear_cases
from tests.kernels.holding_decode import BUFFERS, hold, results
from tests.kernels.holding_products import hold_experts, hold_linear, hold_route
from tests.kernels.holding_sampling import draws, sampled
from tests.kernels.holding_sampling import hold as hold_sampling

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


OF_NANO = [linear_cases.Case(f"qkv-{rows}", rows, 2688, (4096, 256, 256), 0) for rows in (1, 8, 40)]
OF_NANO += [
    linear_cases.Case(f"out-{rows}", rows, 4096, (2688,), 512, residual=True, wide=True)
    for rows in (1, 8, 40, 100)
]
FEW_EXPERTS = [  # of Nano's widths
    expert_cases.Case(f"nano-{rows}", rows, 2688, 16, 6, 1856, shared=3712) for rows in (1, 8, 40)
]


@pytest.mark.parametrize("impl", ["portable", "triton"])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("case", (*linear_cases.CASES, *OF_NANO), ids=lambda case: case.name)
def test_projections(case, dtype, impl):
    hold_linear(case, dtype, "cuda", impl)


@pytest.mark.parametrize("impl", ["portable", "triton"])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("case", (*expert_cases.CASES, *FEW_EXPERTS), ids=lambda case: case.name)
def test_experts(case, dtype, impl):
    hold_route(case, dtype, "cuda", impl)
    hold_experts(case, dtype, "cuda", impl)


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


@pytest.mark.parametrize("impl", ["portable", "triton"])
@pytest.mark.parametrize("case", sampling_cases.CASES, ids=lambda case: case.name)
def test_tokens(case, impl):
    hold_sampling(case, torch.bfloat16 if case.equal else torch.float32, "cuda", impl)


WORDS = 131072
ASKED = [(), ("top_k",), ("top_p",), ("top_k", "top_p", "min_p", "penalty")]


@pytest.mark.parametrize("asked", ASKED, ids=lambda names: "-".join(names) or "plain")
def test_tokens_of_a_whole_vocabulary(asked):
    """The portable form's, but for draws so near a border that rounding decides."""
    case = sampling_cases.Case("words", 64, WORDS, ("temperature", *asked), spread=4.0)
    same = total = 0
    for seed in range(4):
        given = draws(case, torch.bfloat16, "cuda", seed)
        ours, theirs = (sampled(given, impl)["tokens"] for impl in ("triton", "portable"))
        same, total = same + int((ours == theirs).sum()), total + ours.numel()
    assert same >= 0.99 * total


def test_a_graph_of_sampling_follows_its_tensors():
    asked = ("temperature", "top_k", "top_p", "min_p", "penalty")
    case = sampling_cases.Case("words", 8, 20000, asked)
    fixed, eager = (draws(case, torch.float32, "cuda", 0) for _ in range(2))
    sampled(fixed, "triton", 1)  # compiled before the capture
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        ops.sample(**fixed, impl="triton")
    for seed in range(STEPS):
        new = draws(case, torch.float32, "cuda", 1 + seed)
        for given in (fixed, eager):
            for name in ("logits", "active", "temperature", "top_k", "top_p"):
                given[name].copy_(new[name])
        graph.replay()
        ops.sample(**eager, impl="triton")
        for name in ("out", "drawn", "seen", "logprobs"):
            assert torch.equal(fixed[name], eager[name]), name
