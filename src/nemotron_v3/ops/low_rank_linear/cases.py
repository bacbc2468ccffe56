"""Shapes that the tests and benchmarks of low_rank_linear share."""

from dataclasses import dataclass

import torch

from nemotron_v3.ops.common.cases import Draw, Inputs


@dataclass(frozen=True)
class Case:
    name: str
    shape: tuple[int, ...]  # of x, without its width
    inputs: int
    outputs: int
    rank: int
    scale: float = 2.0
    bias: bool = False
    strided: bool = False


CASES = (
    Case("one-token", (1,), 24, 40, 4),
    Case("rank-one", (3, 11), 32, 17, 1, scale=0.5),
    Case("bias", (65,), 40, 24, 8, bias=True),
    Case("odd", (127,), 33, 19, 5, strided=True),
    Case("no-tokens", (0,), 16, 24, 4),
)


def make_inputs(
    case: Case, dtype: torch.dtype, device: torch.device | str, generator: torch.Generator
) -> Inputs:
    draw = Draw(generator, dtype, device, case.strided)
    inputs, outputs, r = case.inputs, case.outputs, case.rank
    tensors = {
        "x": draw.activation(*case.shape, inputs),
        "weight": draw.normal(outputs, inputs, scale=inputs**-0.5),
        "a": draw.normal(r, inputs, scale=inputs**-0.5),
        "b": draw.normal(outputs, r, scale=r**-0.5),
    }
    if case.bias:
        tensors["bias"] = draw.normal(outputs)
    return Inputs(tensors, {"scale": case.scale})
