"""A fused LoRA layer against PEFT's own: its numbers, and its call where it says more."""

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.func import functional_call

from tests.accuracy import check

pytest.importorskip("peft")
from peft import LoraConfig, inject_adapter_in_model
from peft.tuners.lora.layer import Linear

from nemotron_v3 import ops
from nemotron_v3.hf.lora_linear import FusedLoraLinear, fuse_lora_
from nemotron_v3.ops.low_rank_linear import cases
from nemotron_v3.ops.low_rank_linear.reference import low_rank_linear as reference

NAMES = {
    "base_layer.weight": "weight",
    "base_layer.bias": "bias",
    "lora_A.default.weight": "a",
    "lora_B.default.weight": "b",
}


@pytest.fixture
def calls(monkeypatch) -> list[int]:
    """An entry for each call of the op."""
    told = []
    op = ops.low_rank_linear

    def counted(*args: Any, **kwargs: Any) -> Tensor:
        told.append(1)
        return op(*args, **kwargs)

    monkeypatch.setattr(ops, "low_rank_linear", counted)
    return told


def adapted(inputs: int = 40, outputs: int = 24, bias: bool = False, **settings: Any) -> nn.Module:
    """A linear layer in a model, with PEFT's adapters that say something."""
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(inputs, outputs, bias=bias)).requires_grad_(False)
    settings = {"r": 8, "lora_alpha": 16, "init_lora_weights": False} | settings
    return inject_adapter_in_model(LoraConfig(target_modules=["0"], **settings), model)


def through(kind: type[nn.Module], case: cases.Case) -> Callable[..., Tensor]:
    """A layer of a kind as a function of its weights."""
    layer = adapted(case.inputs, case.outputs, case.bias, r=case.rank)[0]
    layer.scaling["default"] = case.scale
    layer.__class__ = kind

    def run(x: Tensor, *, scale: float, **weights: Tensor) -> Tensor:
        assert scale == case.scale
        given = {n: weights[short] for n, short in NAMES.items() if short in weights}
        return functional_call(layer, given, (x,))

    return run


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("case", cases.CASES, ids=lambda case: case.name)
def test_errors_are_at_most_twice_pefts(case, dtype, calls):
    """Of outputs and gradients, by the accuracy rule."""
    check(
        through(FusedLoraLinear, case),
        reference,
        lambda generator: cases.make_inputs(case, dtype, "cpu", generator),
        dtype=dtype,
        plain=through(Linear, case),
    )
    assert calls


def twins(**settings: Any) -> tuple[nn.Module, nn.Module]:
    theirs, ours = adapted(**settings), adapted(**settings)
    fuse_lora_(ours)
    return theirs, ours


def test_a_fused_layer_has_pefts_parameters_and_graph(calls):
    theirs, ours = twins()
    assert type(ours[0]) is FusedLoraLinear
    assert ours.state_dict().keys() == theirs.state_dict().keys()
    x = torch.randn(5, 40, requires_grad=True)
    for model in (theirs, ours):
        model(x).square().sum().backward()
    for a, b in zip(theirs.parameters(), ours.parameters(), strict=True):
        assert (a.grad is None) == (b.grad is None)
        assert a.grad is None or torch.allclose(a.grad, b.grad, rtol=1e-5)
    assert calls == [1]


def no_adapters(layer: Any) -> None:
    layer.enable_adapters(False)


def hooked(layer: Any) -> None:
    layer.lora_A["default"].register_forward_hook(lambda module, args, out: out + 1)


def half_in_another_dtype(layer: Any) -> None:
    layer.lora_A["default"].double()
    layer.lora_B["default"].double()


@pytest.mark.parametrize(
    ("settings", "change"),
    [
        ({}, no_adapters),
        ({}, hooked),
        ({}, half_in_another_dtype),
        ({}, lambda layer: layer.merge()),
        ({}, lambda layer: layer.set_adapter([])),
        ({"lora_dropout": 0.5}, lambda layer: None),
        ({"use_dora": True}, lambda layer: None),
        ({"lora_bias": True, "bias": True}, lambda layer: None),
    ],
)
def test_what_is_more_than_an_update_is_pefts_call(settings, change, calls):
    x, told = torch.randn(5, 40), []
    for model in twins(**settings):
        change(model[0])
        torch.manual_seed(1)
        told.append(model(x))
    assert torch.equal(*told) and not calls


def test_autocast_is_pefts(calls):
    x, told = torch.randn(5, 40), []
    with torch.autocast("cpu", torch.bfloat16):
        told = [model(x) for model in twins()]
    assert torch.equal(*told) and not calls


def test_dropout_is_nothing_in_evaluation(calls):
    theirs, ours = (model.eval() for model in twins(lora_dropout=0.5))
    x = torch.randn(5, 40)
    assert torch.allclose(theirs(x), ours(x), atol=1e-5) and calls == [1]
