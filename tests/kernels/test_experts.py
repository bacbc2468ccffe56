"""The kernels of the experts, the router and relu2 in Triton's interpreter, in fp32 and fp16."""

from functools import partial

import pytest
import torch
from torch.utils.checkpoint import checkpoint

from nemotron_v3 import BackendConfig, MoEConfig, ops
from nemotron_v3.layers.moe import NemotronV3MoE
from nemotron_v3.ops.experts import cases, reference
from nemotron_v3.ops.relu2 import cases as relu2_cases
from tests.accuracy import PlainPyTorch, check
from tests.kernels.holding import hold, results
from tests.kernels.isolation import SPOILT, hold_isolation

pytest.importorskip("triton")
from nemotron_v3.ops.experts.kernels import launch

pytestmark = pytest.mark.skipif(torch.cuda.is_available(), reason="tests/gpu runs them compiled")

F32, F16 = torch.float32, torch.float16
# Experts with fewer rows than a step of their gradient, and with more than one.
NAN_CASES = (
    cases.Case("few-rows", 20, 33, 40, 4, 1),
    cases.Case("many-rows", 90, 33, 40, 3, 2, used=3),
)
SIZES = {
    "dim": 48,
    "n_routed_experts": 5,
    "n_activated_experts": 2,
    "moe_inter_dim": 40,
    "shared_expert_inter_dim": 24,
    "route_scale": 2.5,
}


def make(case: cases.Case, dtype: torch.dtype = F32) -> cases.Inputs:
    return cases.make_inputs(case, dtype, "cpu", torch.Generator().manual_seed(0))


@pytest.mark.parametrize(
    ("case", "dtype"),
    [
        (cases.Case("idle-experts", 30, 40, 72, 12, 3, used=4), F16),
        (cases.Case("all-rows-to-one", 70, 33, 67, 3, 1, used=1, strided=True), F32),
        (cases.Case("wide", 12, 150, 130, 3, 2), F16),
        (cases.Case("no-tokens", 0, 32, 48, 8, 2), F32),
    ],
    ids=lambda value: getattr(value, "name", str(value)[6:]),
)
def test_accuracy(case, dtype):
    hold("experts", case, dtype, "cpu")


@pytest.mark.parametrize("dtype", [F32, F16])
def test_relu2(dtype):
    hold("relu2", relu2_cases.Case("odd", 33, 67, strided=True), dtype, "cpu")


def test_weights_of_nothing_and_below():
    """A weight of 0 has a gradient, a negative one the sign of its own."""
    case = cases.Case("signs", 20, 33, 40, 4, 3)

    def make_inputs(generator):
        inputs = cases.make_inputs(case, F32, "cpu", generator)
        inputs.tensors["weights"][::3] *= -1
        inputs.tensors["weights"][::4, 1] = 0.0
        inputs.tensors["weights"][::5, 2] = 1e-35
        return inputs

    run = partial(ops.experts, impl="triton")
    plain = PlainPyTorch(reference.experts, F32)
    check(run, reference.experts, make_inputs, dtype=F32, plain=plain)


@pytest.mark.parametrize(("tokens", "experts", "top_k", "used"), [(300, 7, 3, 7), (65, 130, 1, 2)])
def test_rows_are_sorted_stably(tokens, experts, top_k, used):
    """Against PyTorch's stable sort; an expert's tiles cover its rows and no other's."""
    from nemotron_v3.ops.experts.kernels.launch import sort_rows, sorted_rows

    generator = torch.Generator().manual_seed(0)
    indices = torch.randint(used, (tokens, top_k), generator=generator)
    weights = torch.randn(tokens, top_k, generator=generator)
    weights[3] = 0.0
    found = sorted_rows(indices, indices.numel(), experts, 16)
    sort_rows(indices, weights, 16, found)
    order = indices.flatten().argsort(stable=True)
    assert torch.equal(found.place[order], torch.arange(tokens * top_k, dtype=torch.int32))
    token = order // top_k
    token = torch.where(weights.flatten()[order] == 0, -1 - token, token)
    assert torch.equal(found.source, token.int())
    assert torch.equal(found.weights, weights.flatten()[order])
    counts = torch.bincount(indices.flatten(), minlength=experts)
    assert torch.equal(found.offsets.diff(), counts.int())
    tiles = (counts + 15) // 16
    assert torch.equal(found.tile_first.diff(), tiles.int())
    expected = torch.arange(experts).repeat_interleave(tiles)
    assert torch.equal(found.tile_expert[: len(expected)], expected.int())


@pytest.mark.parametrize("dtype", [F32, F16])
def test_stacks_that_lie_transposed_are_read_where_they_are(dtype, monkeypatch):
    """As NeMo AutoModel holds them, `[E, X, F]` and `[E, F, X]`: neither they nor their gradients
    are copied."""
    case = cases.Case("odd", 45, 33, 67, 5, 2, used=4)
    inputs = make(case, dtype)
    x, weights, up, down = inputs.tensors.values()
    indices, dy = inputs.options["indices"], torch.randn_like(x)
    read: list[int] = []
    products = launch.rows_product

    def product(tiles, where, a, matrix, *args, **options):
        read.append(matrix.untyped_storage().data_ptr())
        products(tiles, where, a, matrix, *args, **options)

    written: list[int] = []
    gradients_of_stacks = launch.weights_product

    def gradient(tiles, where, a, b, out, **options):
        written.append(out.untyped_storage().data_ptr())
        gradients_of_stacks(tiles, where, a, b, out, **options)

    monkeypatch.setattr(launch, "rows_product", product)
    monkeypatch.setattr(launch, "weights_product", gradient)
    found = []
    for lies in (False, True):
        held = [t.mT.contiguous() if lies else t.clone() for t in (up, down)]
        x, weights, *held = (t.detach().clone().requires_grad_() for t in (x, weights, *held))
        read.clear()
        written.clear()
        stacks = [t.mT if lies else t for t in held]
        y = ops.experts(x, indices, weights, *stacks, impl="triton")
        y.backward(dy)
        assert set(read) == {t.untyped_storage().data_ptr() for t in held}
        assert set(written) == {t.grad.untyped_storage().data_ptr() for t in held}
        assert all(t.grad.is_contiguous() for t in held)
        stacks = [t.grad.mT if lies else t.grad for t in held]
        found.append([y.detach(), x.grad, weights.grad, *stacks])
    for a, b in zip(*found, strict=True):
        torch.testing.assert_close(a, b)


def test_only_what_is_wanted_is_computed():
    """Frozen experts: the gradients of the input and of the weights are the same as ever."""
    inputs = make(cases.Case("frozen", 20, 33, 40, 4, 3))
    every = results("experts", inputs)
    tensors = {k: t.detach() for k, t in inputs.tensors.items()}
    leaves = [tensors[k].requires_grad_() for k in ("x", "weights")]
    y = ops.experts(**tensors, **inputs.options, impl="triton")
    generator = torch.Generator().manual_seed(1)
    dy = torch.randn(y.shape, generator=generator, dtype=torch.float64).float()
    y.backward(dy)
    for leaf, expected in zip(leaves, every[1:3], strict=True):
        assert torch.equal(leaf.grad, expected)
    assert all(tensors[k].grad is None for k in ("up_proj", "down_proj"))


@pytest.mark.parametrize(
    "spoilt", [SPOILT[0], *(pytest.param(name, marks=pytest.mark.heavy) for name in SPOILT[1:])]
)
@pytest.mark.parametrize("case", NAN_CASES, ids=lambda case: case.name)
def test_nan_stays_with_its_token_and_experts(case, spoilt):
    hold_isolation("experts", make(case), spoilt, "triton")


@pytest.fixture(scope="module")
def layer() -> NemotronV3MoE:
    torch.manual_seed(0)
    config = MoEConfig(**SIZES)
    return NemotronV3MoE(config, backend=BackendConfig(impl="triton"), initializer_range=0.2)


def gradients(layer: NemotronV3MoE, run, x: torch.Tensor) -> list[torch.Tensor]:
    y = run(x)
    return [y.detach(), *torch.autograd.grad(y.square().sum(), [x, *layer.parameters()])]


def test_compiled_block_equals_eager(layer):
    """`torch.compile(fullgraph=True)` sees router, experts and relu2 as nodes."""
    x = torch.randn(1, 9, 48, requires_grad=True)
    compiled = torch.compile(layer, backend="aot_eager", fullgraph=True)
    pairs = zip(gradients(layer, layer, x), gradients(layer, compiled, x), strict=True)
    assert all(torch.equal(a, b) for a, b in pairs)


def test_recomputed_block_equals_kept(layer):
    """Activation checkpointing routes as before; a graph may be walked twice."""
    x = torch.randn(1, 9, 48, requires_grad=True)
    kept = gradients(layer, layer, x)
    recomputed = gradients(layer, partial(checkpoint, layer, use_reentrant=False), x)
    assert all(torch.equal(a, b) for a, b in zip(kept, recomputed, strict=True))
    loss = layer(x).square().sum()
    loss.backward(retain_graph=True)
    first, x.grad = x.grad, None
    loss.backward()
    assert torch.equal(first, x.grad)
    layer.zero_grad()


def test_what_kernels_cannot_do_is_refused():
    inputs = make(cases.Case("double", 3, 8, 8, 4, 1), torch.float64)
    with pytest.raises(RuntimeError, match="computes in fp32, and torch.float64"):
        ops.experts(**inputs.tensors, **inputs.options, impl="triton")
    many = torch.zeros(2049, 1, 1)
    with pytest.raises(RuntimeError, match="at most 2048 experts, and there are 2049"):
        ops.experts(
            torch.ones(1, 1), torch.zeros(1, 1, dtype=torch.int64), torch.ones(1, 1), many, many,
            impl="triton",
        )  # fmt: skip
