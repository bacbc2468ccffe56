"""Layers of NeMo AutoModel as functions of tensors, for the accuracy rule.

The truth is the same layer in fp64, computed by this package's reference forms. Both are held to
the rule against it: theirs, so that a reference of another meaning would be found, and ours.
"""

import copy
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn
from torch.func import functional_call

from nemotron_v3.nemo import accelerate
from nemotron_v3.ops.common.cases import Inputs
from tests.accuracy import PlainPyTorch, Report, three_ways

Call = Callable[[Callable[..., Any], Tensor], Tensor]


def as_function(layer: nn.Module, call: Call) -> Callable[..., Tensor]:
    """`layer` as a function of `x` and its own tensors, called by `call(layer, x)`."""

    def function(
        *, x: Tensor, fixed: dict[str, Tensor], dtype: torch.dtype | None = None, **tensors: Tensor
    ) -> Tensor:
        tensors = tensors | {k: t.to(x.dtype) for k, t in fixed.items()}
        if dtype is not None:
            x, tensors = x.to(dtype), {k: t.to(dtype) for k, t in tensors.items()}

        def called(*args: Any, **kwargs: Any) -> Tensor:
            return functional_call(layer, tensors, args, kwargs)

        return call(called, x)

    return function


class ByTheRule:
    """Layers of theirs, and accelerated ones, held to the accuracy rule over several configs."""

    def __init__(self) -> None:
        # Theirs is no promise of this package: it only has to be the same function.
        self.reports = {"theirs": Report(factor=3.0), "ours": Report(factor=2.0)}

    def add(self, theirs: nn.Module, x: Tensor, call: Call, seed: int = 0) -> None:
        """Both on new draws of `x` and of every tensor of the layer, forward and gradients.

        Args:
            theirs: the layer, in fp32.
            x: of the shape and dtype of what it is called with.
            call: calls a layer.
            seed: of the draws.
        """
        layers = {"theirs": theirs, "ours": accelerate(copy.deepcopy(theirs))}
        truth = as_function(accelerate(copy.deepcopy(theirs), impl="reference"), call)
        plain = PlainPyTorch(truth, torch.float32)
        for name, layer in layers.items():
            generator = torch.Generator().manual_seed(seed)
            inputs = drawn(theirs, x, generator)
            function = as_function(layer, call)
            self.reports[name].add(*three_ways(function, truth, plain, inputs, generator))

    def check(self) -> None:
        for name, report in self.reports.items():
            failures = report.failures()
            assert not failures, f"{name}: {', '.join(failures)}\n{report}"


def drawn(layer: nn.Module, x: Tensor, generator: torch.Generator) -> Inputs:
    """`x`, and the tensors of the layer moved off their values.

    The bias of keys is fixed: it moves all scores of a query alike, so that its gradient is 0 and
    what is computed of it is rounding alone.
    """
    tensors = {"x": torch.randn(x.shape, generator=generator, dtype=x.dtype)}
    for name, tensor in {**dict(layer.named_parameters()), **dict(layer.named_buffers())}.items():
        noise = torch.randn(tensor.shape, generator=generator, dtype=tensor.dtype)
        tensors[name] = tensor.detach() + 0.1 * noise
    fixed = {name: tensors.pop(name) for name in list(tensors) if name.endswith("k_proj.bias")}
    return Inputs(tensors, {"fixed": fixed})
