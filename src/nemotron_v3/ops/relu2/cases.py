"""Shapes that the tests and benchmarks of relu2 share."""

from dataclasses import dataclass

import torch

from nemotron_v3.ops.common.cases import Draw, Inputs


@dataclass(frozen=True)
class Case:
    name: str
    tokens: int
    width: int
    strided: bool = False


CASES = (
    Case("one-token", 1, 5),
    Case("odd", 129, 67, strided=True),
    Case("no-tokens", 0, 32),
)


def make_inputs(
    case: Case, dtype: torch.dtype, device: torch.device | str, generator: torch.Generator
) -> Inputs:
    draw = Draw(generator, dtype, device, case.strided)
    return Inputs({"x": draw.activation(case.tokens, case.width)}, {})
