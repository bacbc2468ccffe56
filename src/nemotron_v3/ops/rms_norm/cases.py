"""Shapes that the tests and benchmarks of rms_norm share."""

from dataclasses import dataclass

import torch

from nemotron_v3.ops.common.cases import Draw, Inputs


@dataclass(frozen=True)
class Case:
    name: str
    tokens: int
    width: int
    scale: float = 1.0  # of x: small ones meet eps
    strided: bool = False


CASES = (
    Case("one-token", 1, 64),
    Case("odd-width", 3, 67),
    Case("below-eps", 129, 80, scale=1e-3),
    Case("large", 127, 96, scale=1e3),
    Case("strided", 128, 128, strided=True),
    Case("thousand", 1000, 256),
)


def make_inputs(
    case: Case, dtype: torch.dtype, device: torch.device | str, generator: torch.Generator
) -> Inputs:
    draw = Draw(generator, dtype, device, case.strided)
    tensors = {
        "x": draw.activation(case.tokens, case.width, scale=case.scale),
        "weight": draw.uniform(case.width, low=0.5, high=1.5),
    }
    return Inputs(tensors, {"eps": 1e-5})
