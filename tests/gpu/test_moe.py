"""The mixture of experts on a GPU: the rule, determinism, graphs, no host sync, large indices."""

import functools
from functools import partial

import pytest
import torch
from torch import Tensor
from torch.utils.checkpoint import checkpoint

from nemotron_v3 import BackendConfig, MoEConfig, SequenceLayout, ops
from nemotron_v3.layers.moe import NemotronV3MoE
from nemotron_v3.ops.experts import cases as experts_cases
from nemotron_v3.ops.grouped_low_rank import cases as low_rank_cases
from nemotron_v3.ops.relu2 import cases as relu2_cases
from nemotron_v3.ops.router import cases as router_cases
from tests.accuracy import relative_error
from tests.kernels.holding import hold, results
from tests.kernels.isolation import SPOILT, hold_isolation

pytestmark = [
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU"),
    pytest.mark.heavy,
]

BF16 = torch.bfloat16
Case = experts_cases.Case
# Whole tiles and tails of rows and columns: 256 + 64, 256 + 128, 256 + 136; an expert of 2 tiles.
TILES = (
    Case("tiles", 300, 320, 384, 3, 2),
    Case("one-expert-of-four", 250, 392, 64, 4, 1, used=1),
    Case("odd-tiles", 200, 269, 301, 2, 1, strided=True),
)
UPDATED = (
    low_rank_cases.Case("tiles", 300, 320, 384, 3, 2, 16, scale=2.0),
    low_rank_cases.Case("high-rank", 200, 269, 301, 2, 1, 72, strided=True),
)
EVERY = [
    pytest.param(op, case, dtype, id=f"{op}-{case.name}-{str(dtype)[6:]}")
    for op, cases in (
        ("experts", (*experts_cases.CASES[2:], *TILES)),
        ("grouped_low_rank", (*low_rank_cases.CASES[1:], *UPDATED)),
        ("router", router_cases.CASES[2:]),
        ("relu2", relu2_cases.CASES[1:]),
    )
    for case in cases
    for dtype in (BF16, torch.float16, torch.float32)
]


@pytest.mark.parametrize(("op", "case", "dtype"), EVERY)
def test_accuracy(op, case, dtype):
    hold(op, case, dtype, "cuda")


def draw(case: Case, seed: int = 0) -> experts_cases.Inputs:
    return experts_cases.make_inputs(case, BF16, "cuda", torch.Generator().manual_seed(seed))


def test_as_the_portable_form_at_many_experts():
    """22 of 512, and gradients bit-identical over runs."""
    inputs = draw(Case("super", 512, 256, 384, 512, 22))
    first, second = results("experts", inputs), results("experts", inputs)
    assert all(torch.equal(a, b) for a, b in zip(first, second, strict=True))
    for ours, theirs in zip(first, results("experts", inputs, "portable"), strict=True):
        assert relative_error(ours, theirs) < 1e-2


@pytest.mark.parametrize("spoilt", SPOILT)
@pytest.mark.parametrize("tokens", [90, 700])
@pytest.mark.parametrize("op", ["experts", "grouped_low_rank"])
@pytest.mark.parametrize("impl", ["triton", "portable"])
def test_nan_stays_with_its_token_and_experts(op, tokens, spoilt, impl):
    """Experts with fewer rows than a step of their gradient, and with several steps."""
    generator = torch.Generator().manual_seed(0)
    if op == "experts":
        inputs = draw(Case("nan", tokens, 320, 384, 4, 1))
    else:
        case = low_rank_cases.Case("nan", tokens, 320, 384, 4, 1, 16)
        inputs = low_rank_cases.make_inputs(case, BF16, "cuda", generator)
    hold_isolation(op, inputs, spoilt, impl)


def test_past_two_to_the_31_elements():
    """The last tokens' rows lie beyond 2^31 elements, and are as if alone."""
    T, K, E, F, X = 200_000, 6, 8, 1856, 64
    inputs = draw(Case("small", 64, X, F, E, K))
    alone = ops.experts(**inputs.tensors, **inputs.options, impl="triton")
    indices = torch.randint(E - 1, (T, K), device="cuda")
    indices[-64:] = inputs.options["indices"]
    x, weights = torch.randn(T, X, device="cuda", dtype=BF16), torch.rand(T, K, device="cuda")
    x[-64:], weights[-64:] = inputs.tensors["x"], inputs.tensors["weights"]
    matrices = (inputs.tensors["up_proj"], inputs.tensors["down_proj"])
    assert T * K * F > 2**31
    assert torch.equal(ops.experts(x, indices, weights, *matrices, impl="triton")[-64:], alone)


@pytest.fixture(scope="module", params=[0, 8], ids=["plain", "updated"])
def layer(request) -> NemotronV3MoE:
    """Its experts with low-rank updates of a rank, where that is not 0."""
    torch.manual_seed(0)
    config = MoEConfig(
        dim=256,
        n_routed_experts=16,
        n_activated_experts=4,
        moe_inter_dim=320,
        shared_expert_inter_dim=192,
        route_scale=2.5,
        moe_latent_size=128,
    )
    layer = NemotronV3MoE(config, backend=BackendConfig(impl="triton"), initializer_range=0.1)
    layer.to("cuda", BF16)
    if request.param:
        low = layer.experts.add_low_rank(request.param)
        for b in (low.up_b, low.down_b):
            torch.nn.init.normal_(b, std=0.1)
    return layer


def step(layer: NemotronV3MoE, run, x: Tensor) -> list[Tensor]:
    """The layout is the caller's, made once: to make it copies lengths from the host."""
    y = run(x, layout=plain_layout())
    return [y.detach(), *torch.autograd.grad(y.square().sum(), [x, *layer.parameters()])]


@functools.cache
def plain_layout() -> SequenceLayout:
    return SequenceLayout.plain(1, 700, "cuda")


def equal(first: list[Tensor], second: list[Tensor]) -> bool:
    return all(torch.equal(a, b) for a, b in zip(first, second, strict=True))


@pytest.fixture
def x() -> Tensor:
    return torch.randn(1, 700, 256, device="cuda", dtype=BF16, requires_grad=True)


def test_a_captured_step_equals_an_eager_one(layer, x):
    eager = step(layer, layer, x)
    stream = torch.cuda.Stream()
    with torch.cuda.stream(stream):
        step(layer, layer, x)
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        captured = step(layer, layer, x)
    for tensor in captured:
        tensor.fill_(float("nan"))
    graph.replay()
    assert equal(captured, eager)


def test_nothing_waits_for_the_host(layer, x):
    step(layer, layer, x)
    torch.cuda.synchronize()
    torch.cuda.set_sync_debug_mode("error")
    try:
        step(layer, layer, x)
    finally:
        torch.cuda.set_sync_debug_mode("default")


def test_compiled_and_recomputed_steps_equal_an_eager_one(layer, x):
    eager = step(layer, layer, x)
    compiled = torch.compile(layer, backend="aot_eager", fullgraph=True)
    assert equal(step(layer, compiled, x), eager)
    assert equal(step(layer, partial(checkpoint, layer, use_reentrant=False), x), eager)


def test_auto_takes_the_kernels(layer, x):
    """On a GPU; a block that keeps nothing for a backward computes the same numbers."""
    expected = step(layer, layer, x)
    for module in (layer.gate, layer.experts, layer.shared_experts):
        module.impl = "auto"
    try:
        assert equal(step(layer, layer, x), expected)
        with torch.no_grad():
            assert torch.equal(layer(x, layout=plain_layout()), expected[0])
    finally:
        for module in (layer.gate, layer.experts, layer.shared_experts):
            module.impl = "triton"
