"""Shapes that the tests and benchmarks of gated_rms_norm share."""

from dataclasses import dataclass

import torch

from nemotron_v3.ops.common.cases import Draw, Inputs


@dataclass(frozen=True)
class Case:
    name: str
    tokens: int
    groups: int
    group_size: int
    gate: bool = True
    scale: float = 1.0  # of y
    strided: bool = False


CASES = (
    Case("one-token", 1, 1, 192),
    Case("odd-groups", 3, 3, 80),
    Case("no-gate", 127, 8, 64, gate=False),
    Case("below-eps", 128, 8, 80, scale=1e-3),
    Case("strided", 129, 1, 240, strided=True),
    Case("thousand", 1000, 8, 64),
)


def make_inputs(
    case: Case, dtype: torch.dtype, device: torch.device | str, generator: torch.Generator
) -> Inputs:
    draw = Draw(generator, dtype, device, case.strided)
    width = case.groups * case.group_size
    tensors = {
        "y": draw.activation(case.tokens, width, scale=case.scale),
        "z": draw.activation(case.tokens, width) if case.gate else None,
        "weight": draw.uniform(width, low=0.5, high=1.5),
    }
    return Inputs(tensors, {"group_size": case.group_size, "eps": 1e-5})
