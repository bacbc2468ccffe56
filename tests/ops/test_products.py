"""Products by oneDNN: linear layers, and experts by their runs of rows."""

import pytest
import torch
from torch import nn
from torch.nn import functional
from torch.utils._python_dispatch import TorchDispatchMode

from nemotron_v3 import ops
from nemotron_v3.layers.linear import project
from nemotron_v3.ops.common import onednn
from nemotron_v3.ops.common.cases import Draw, Inputs
from nemotron_v3.ops.experts import cases as experts_cases
from nemotron_v3.ops.experts import portable_runs
from nemotron_v3.ops.experts import reference as experts_reference
from tests.accuracy import check

pytestmark = pytest.mark.skipif(not onednn.onednn_works(), reason="PyTorch without oneDNN")


def layer_of(weight, bias=None):
    """A linear layer of these, which stay its graph's leaves."""
    layer = nn.Linear(weight.shape[1], weight.shape[0], bias=bias is not None)
    layer.weight = nn.Parameter(weight)
    if bias is not None:
        layer.bias = nn.Parameter(bias)
    return layer


@pytest.mark.parametrize("shape", [(7, 33), (2, 5, 33), (1, 33)], ids=str)
@pytest.mark.parametrize("by", ["rows", "columns"])
def test_a_product_and_its_gradients_meet_the_rule(shape, by):
    def make_inputs(generator):
        draw = Draw(generator, torch.float32)
        weight = draw.normal(65, 33) if by == "rows" else draw.normal(33, 65).t()
        return Inputs({"x": draw.activation(*shape), "weight": weight})

    def ours(x, weight):
        return onednn._Product.apply(x.flatten(0, -2), weight).view(*x.shape[:-1], -1)

    def reference(x, weight, dtype=torch.float64):
        return functional.linear(x.to(dtype), weight.to(dtype))

    check(ours, reference, make_inputs, dtype=torch.float32)


def taken(monkeypatch):
    """How many layers the fast product has computed so far, as a list."""
    calls = []
    plain = onednn.product
    monkeypatch.setattr(onednn, "product", lambda *args: calls.append(1) or plain(*args))
    monkeypatch.setattr(onednn, "SMALLEST", 1)
    return calls


@pytest.mark.parametrize("bias", [False, True])
def test_a_plain_layer_takes_it(monkeypatch, bias):
    calls = taken(monkeypatch)
    generator = torch.Generator().manual_seed(0)
    layer = layer_of(torch.randn(9, 8, generator=generator), torch.ones(9) if bias else None)
    x = torch.randn(3, 4, 8, generator=generator, requires_grad=True)
    torch.testing.assert_close(project(layer, x), layer(x))
    assert len(calls) == 1
    # Second derivatives, and gradients that are one number seen everywhere.
    (dx,) = torch.autograd.grad(project(layer, x).square().sum(), x, create_graph=True)
    (ours,) = torch.autograd.grad(dx.sum(), layer.weight)
    (dx,) = torch.autograd.grad(layer(x).square().sum(), x, create_graph=True)
    (theirs,) = torch.autograd.grad(dx.sum(), layer.weight)
    torch.testing.assert_close(ours, theirs)
    torch.testing.assert_close(
        torch.autograd.grad(project(layer, x).sum(), x),
        torch.autograd.grad(layer(x).sum(), x),
    )


class Doubled(nn.Linear):
    def forward(self, x):
        return 2 * super().forward(x)


def hooked(layer):
    layer.register_forward_hook(lambda module, inputs, output: 2 * output)
    return layer


def with_another_forward(layer):
    plain = layer.forward
    layer.forward = lambda x: 2 * plain(x)
    return layer


def parametrized(layer):
    torch.nn.utils.parametrize.register_parametrization(layer, "weight", nn.Identity())
    return layer


@pytest.mark.parametrize(
    "change",
    [
        hooked,
        with_another_forward,
        parametrized,
        lambda layer: layer.double(),
        lambda layer: layer.bfloat16(),
        lambda layer: Doubled(8, 9, bias=False),
    ],
    ids=["hooked", "another forward", "parametrized", "fp64", "bf16", "another class"],
)
def test_any_other_layer_is_called(monkeypatch, change):
    calls = taken(monkeypatch)
    layer = change(nn.Linear(8, 9, bias=False))
    x = torch.linspace(-1, 1, 32).view(4, 8).to(next(layer.parameters()).dtype)
    assert torch.equal(project(layer, x), layer(x)) and not calls


class Seen(TorchDispatchMode):
    """The names of the operations that run."""

    def __init__(self):
        super().__init__()
        self.names = []

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        self.names.append(func.name())
        return func(*args, **(kwargs or {}))


def test_autocast_modes_and_transforms_see_the_layer(monkeypatch):
    calls = taken(monkeypatch)
    layer, x = nn.Linear(8, 9, bias=False), torch.linspace(-1, 1, 32).view(4, 8)
    with torch.autocast("cpu", torch.bfloat16):
        assert project(layer, x).dtype == torch.bfloat16
    torch.func.vmap(lambda row: project(layer, row))(x)
    with Seen() as seen:
        project(layer, x)
    assert "aten::mm" in seen.names
    assert not calls


@pytest.mark.parametrize("case", experts_cases.CASES, ids=lambda case: case.name)
def test_experts_by_runs_meet_the_rule(monkeypatch, case):
    monkeypatch.setattr(portable_runs, "SMALLEST", 0)

    def make_inputs(generator):
        return experts_cases.make_inputs(case, torch.float32, "cpu", generator)

    def portable(**arguments):
        return ops.experts(**arguments, impl="portable")

    check(portable, experts_reference.experts, make_inputs, dtype=torch.float32)


def test_a_token_does_not_feel_where_the_others_go(monkeypatch):
    monkeypatch.setattr(portable_runs, "SMALLEST", 0)
    case = experts_cases.Case("any", 40, 48, 32, 4, 2)
    inputs = experts_cases.make_inputs(case, torch.float32, "cpu", torch.Generator().manual_seed(0))
    results = []
    for expert in (1, 2, 3):  # of all the others; the first token has expert 0 to itself
        x, weights, up, down = (t.clone().requires_grad_() for t in inputs.tensors.values())
        indices = torch.full((40, 2), expert)
        indices[0] = torch.tensor([0, 1])
        y = portable_runs.experts(x, indices, weights, up, down)
        dx, dweights = torch.autograd.grad(y, (x, weights), torch.ones_like(y))
        results.append((y[0], dx[0], dweights[0]))
    for other in results[1:]:
        assert all(torch.equal(a, b) for a, b in zip(results[0], other, strict=True))


@pytest.mark.parametrize("frozen", ["x", "weights", "up_proj", "down_proj"])
def test_frozen_operands_of_experts(frozen):
    case = experts_cases.Case("any", 20, 48, 32, 4, 2)
    inputs = experts_cases.make_inputs(case, torch.float32, "cpu", torch.Generator().manual_seed(0))
    indices = inputs.options["indices"]

    def gradients(without):
        tensors = {
            name: t.clone().requires_grad_(name != without) for name, t in inputs.tensors.items()
        }
        y = portable_runs.experts(indices=indices, **tensors)
        y.backward(torch.ones_like(y))
        return {name: t.grad for name, t in tensors.items()}

    every, some = gradients(None), gradients(frozen)
    assert some.pop(frozen) is None
    assert all(torch.equal(grad, every[name]) for name, grad in some.items())


def test_a_processor_that_rounds_rows_by_their_company_takes_tiles(monkeypatch):
    monkeypatch.setattr(portable_runs, "SMALLEST", 0)
    monkeypatch.setattr(portable_runs, "rows_are_alike", lambda *sizes: False)
    monkeypatch.setattr(portable_runs, "experts", None)  # not to be called
    case = experts_cases.Case("any", 20, 48, 32, 4, 2)
    inputs = experts_cases.make_inputs(case, torch.float32, "cpu", torch.Generator().manual_seed(0))
    y = ops.experts(**inputs.tensors, **inputs.options, impl="portable")
    true = experts_reference.experts(**inputs.tensors, **inputs.options)
    assert (y - true).norm() < 1e-5 * true.norm()
