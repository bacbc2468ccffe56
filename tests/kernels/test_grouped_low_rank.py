"""Experts with low-rank updates in Triton's interpreter, in fp32 and fp16."""

from functools import partial

import pytest
import torch

from nemotron_v3 import ops
from nemotron_v3.ops.grouped_low_rank import cases, reference
from tests.accuracy import PlainPyTorch, check
from tests.kernels.holding import hold, results
from tests.kernels.isolation import SPOILT, hold_isolation

pytest.importorskip("triton")
pytestmark = pytest.mark.skipif(torch.cuda.is_available(), reason="tests/gpu runs them compiled")

F32, F16 = torch.float32, torch.float16
SMALL = cases.Case("small", 20, 33, 40, 4, 3, 5, scale=0.7)
STACKS = ("up_proj", "down_proj")


def make(case: cases.Case, dtype: torch.dtype = F32) -> cases.Inputs:
    return cases.make_inputs(case, dtype, "cpu", torch.Generator().manual_seed(0))


@pytest.mark.parametrize(
    ("case", "dtype"),
    [
        (cases.CASES[2], F16),
        (cases.CASES[1], F32),
        (cases.Case("odd", 70, 33, 67, 3, 2, 5, scale=3.0, used=3, strided=True), F32),
        (cases.Case("wide", 24, 150, 130, 3, 2, 40, scale=0.7), F16),
        (cases.CASES[4], F32),
    ],
    ids=lambda value: getattr(value, "name", str(value)[6:]),
)
def test_accuracy(case, dtype):
    hold("grouped_low_rank", case, dtype, "cpu")


def test_weights_of_nothing_and_below():
    """A weight of 0 has a gradient and no part in those of the updates."""

    def make_inputs(generator):
        inputs = cases.make_inputs(SMALL, F32, "cpu", generator)
        inputs.tensors["weights"][::3] *= -1
        inputs.tensors["weights"][::4, 1] = 0.0
        inputs.tensors["weights"][::5, 2] = 1e-35
        return inputs

    run = partial(ops.grouped_low_rank, impl="triton")
    truth = reference.grouped_low_rank
    check(run, truth, make_inputs, dtype=F32, plain=PlainPyTorch(truth, F32))


def test_ranks_may_differ():
    def make_inputs(generator):
        inputs = cases.make_inputs(SMALL, F32, "cpu", generator)
        inputs.tensors["down_a"] = inputs.tensors["down_a"][:, :1]
        inputs.tensors["down_b"] = inputs.tensors["down_b"][:, :, :1]
        return inputs

    run = partial(ops.grouped_low_rank, impl="triton")
    truth = reference.grouped_low_rank
    check(run, truth, make_inputs, dtype=F32, plain=PlainPyTorch(truth, F32))


@pytest.mark.parametrize(
    "wanted",
    [("up_a", "up_b", "down_a", "down_b"), ("x", "weights"), ("up_a",), ("down_b", "up_proj")],
    ids="-".join,
)
def test_only_what_is_wanted_is_computed(wanted, monkeypatch):
    """The gradients asked for are the same as ever, and no product makes another matrix's."""
    from nemotron_v3.ops.experts.kernels import launch

    inputs = make(SMALL)
    every = dict(zip(inputs.tensors, results("grouped_low_rank", inputs)[1:], strict=True))
    tensors = {k: t.detach().requires_grad_(k in wanted) for k, t in inputs.tensors.items()}
    made, product = [], launch.weights_product

    def counted(*args, **kwargs):
        made.append(tuple(args[4].shape))
        product(*args, **kwargs)

    monkeypatch.setattr(launch, "weights_product", counted)
    y = ops.grouped_low_rank(**tensors, **inputs.options, impl="triton")
    generator = torch.Generator().manual_seed(1)
    y.backward(torch.randn(y.shape, generator=generator, dtype=torch.float64).float())
    assert sorted(made) == sorted(tuple(tensors[n].shape) for n in {*wanted} - {"x", "weights"})
    for name, tensor in tensors.items():
        if name in wanted:
            assert torch.equal(tensor.grad, every[name]), name
        else:
            assert tensor.grad is None, name


@pytest.mark.parametrize(
    "spoilt", [SPOILT[0], *(pytest.param(name, marks=pytest.mark.heavy) for name in SPOILT[1:])]
)
def test_nan_stays_with_its_token_and_experts(spoilt):
    case = cases.Case("many-rows", 90, 33, 40, 3, 2, 5, used=3)
    hold_isolation("grouped_low_rank", make(case), spoilt, "triton")


def test_an_update_of_nothing_gives_the_experts_bit_for_bit():
    inputs = make(SMALL, F16)
    for name in ("up_b", "down_b"):
        inputs.tensors[name] = torch.zeros_like(inputs.tensors[name])
    names = ("x", "weights", *STACKS)
    experts = cases.Inputs({n: inputs.tensors[n] for n in names}, {})
    experts.options["indices"] = inputs.options["indices"]
    updated, plain = results("grouped_low_rank", inputs), results("experts", experts)
    for ours, theirs in zip(updated[:5], plain, strict=True):
        assert torch.equal(ours, theirs)


def test_compiled_graph_equals_eager():
    """`torch.compile(fullgraph=True)` sees the op as a node, forward and backward."""
    inputs = make(SMALL)
    leaves = {k: t.detach().requires_grad_(k not in STACKS) for k, t in inputs.tensors.items()}

    def run(**tensors):
        return ops.grouped_low_rank(**tensors, **inputs.options, impl="triton")

    compiled = torch.compile(run, backend="aot_eager", fullgraph=True)
    given = [t for t in leaves.values() if t.requires_grad]
    found = [(y, *torch.autograd.grad(y.square().sum(), given)) for y in (
        run(**leaves), compiled(**leaves)
    )]  # fmt: skip
    assert all(torch.equal(a, b) for a, b in zip(*found, strict=True))


def test_what_kernels_cannot_do_is_refused():
    inputs = make(SMALL, torch.float64)
    with pytest.raises(RuntimeError, match="grouped_low_rank: .*fp32, and torch.float64"):
        ops.grouped_low_rank(**inputs.tensors, **inputs.options, impl="triton")
