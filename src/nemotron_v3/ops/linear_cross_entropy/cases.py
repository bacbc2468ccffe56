"""Shapes that the tests and benchmarks of linear_cross_entropy share."""

from dataclasses import dataclass

import torch

from nemotron_v3.ops.common.cases import Draw, Inputs


@dataclass(frozen=True)
class Case:
    name: str
    tokens: int
    width: int
    vocabulary: int
    ignored: float = 0.0  # the share of tokens without a target
    scale: float = 1.0  # of the logits
    ignore_index: int = -100
    z_loss: float = 0.0
    strided: bool = False


CASES = (
    Case("one-token", 1, 16, 67),
    Case("some-ignored", 127, 32, 257, ignored=0.3),
    Case("z-loss", 65, 24, 128, ignored=0.3, ignore_index=-1, z_loss=1e-2, strided=True),
    Case("large-logits", 64, 48, 1000, scale=20.0),
    Case("none-left", 5, 8, 33, ignored=1.0, z_loss=0.1),
    Case("no-tokens", 0, 8, 33),
)


def make_inputs(
    case: Case, dtype: torch.dtype, device: torch.device | str, generator: torch.Generator
) -> Inputs:
    draw = Draw(generator, dtype, device, case.strided)
    targets = draw.integers(case.tokens, high=case.vocabulary)
    dropped = draw.uniform(case.tokens, low=0.0, high=1.0, wide=True) < case.ignored
    tensors = {
        "hidden": draw.activation(case.tokens, case.width),
        "weight": draw.normal(case.vocabulary, case.width, scale=case.scale * case.width**-0.5),
    }
    options = {
        "targets": targets.masked_fill(dropped, case.ignore_index),
        "ignore_index": case.ignore_index,
        "z_loss": case.z_loss,
    }
    return Inputs(tensors, options)
