"""Shapes that the tests and benchmarks of router share."""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch

from nemotron_v3.ops.common.cases import Draw, Inputs


@dataclass(frozen=True)
class Case:
    """The correction bias is normal around `bias_centre` with the spread `bias`."""

    name: str
    tokens: int
    hidden: int
    experts: int
    top_k: int
    n_group: int = 1
    topk_group: int = 1
    norm_topk_prob: bool = True
    scaling_factor: float = 1.0
    bias: float = 0.1
    bias_centre: float = 0.0


CASES = (
    Case("one-token", 1, 64, 8, 2),
    Case("one-expert", 3, 32, 4, 1, scaling_factor=2.5),
    Case("all-experts", 17, 48, 6, 6),
    Case("not-normalised", 127, 64, 16, 4, norm_topk_prob=False, scaling_factor=5.0),
    Case("grouped", 129, 64, 16, 3, n_group=4, topk_group=2),
    Case("grouped-negative", 64, 64, 16, 3, n_group=4, topk_group=2, bias_centre=-3.0),
    Case("many-experts", 200, 96, 128, 6, scaling_factor=2.5),
    Case("no-tokens", 0, 32, 8, 2),
)


def make_inputs(
    case: Case, dtype: torch.dtype, device: torch.device | str, generator: torch.Generator
) -> Inputs:
    draw = Draw(generator, dtype, device)
    tensors = {
        "x": draw.activation(case.tokens, case.hidden),
        "weight": draw.normal(case.experts, case.hidden, scale=case.hidden**-0.5),
    }
    options = {
        "bias": case.bias_centre + draw.normal(case.experts, scale=case.bias, wide=True),
        "top_k": case.top_k,
        "n_group": case.n_group,
        "topk_group": case.topk_group,
        "norm_topk_prob": case.norm_topk_prob,
        "scaling_factor": case.scaling_factor,
    }
    return Inputs(tensors, options)


def dense(router: Callable) -> Callable:
    """A router's weights as `[T, E]`: its choices come in no particular order."""

    def run(*, weight: torch.Tensor, **arguments: Any) -> torch.Tensor:
        weights, indices = router(weight=weight, **arguments)
        return weights.new_zeros(len(weights), len(weight)).scatter(1, indices, weights)

    return run
