"""Shapes that the tests and benchmarks of causal_conv1d share."""

from dataclasses import dataclass
from typing import Literal

import torch

from nemotron_v3.layout import SequenceLayout
from nemotron_v3.ops.common.cases import Draw, Inputs


@dataclass(frozen=True)
class Case:
    name: str
    lengths: tuple[int, ...]
    channels: int
    width: int
    bias: bool = True
    activation: Literal["silu"] | None = "silu"
    initial_states: bool = False
    strided: bool = False


CASES = (
    Case("one-token", (1,), 67, 4),
    Case("one-token-continued", (1,), 64, 4, initial_states=True),
    Case("two", (2,), 80, 2, bias=False, initial_states=True),
    Case("three", (3,), 96, 8, activation=None),
    Case("below-chunk", (127,), 80, 3, initial_states=True),
    Case("chunk", (128,), 64, 5, bias=False),
    Case("above-chunk", (129,), 72, 6, strided=True),
    Case("thousand", (1000,), 64, 7),
    Case("pack", (1, 0, 4, 1, 3, 37, 0, 5), 80, 4, initial_states=True, strided=True),
    Case("pack-wide", (1, 1, 7, 8, 9, 2), 64, 8, activation=None, initial_states=True),
    Case("batch", (64, 64, 64), 64, 4),
    Case("all-empty", (0, 0), 64, 4, initial_states=True),
)


def make_inputs(
    case: Case, dtype: torch.dtype, device: torch.device | str, generator: torch.Generator
) -> Inputs:
    draw = Draw(generator, dtype, device, case.strided)
    channels, width, documents = case.channels, case.width, len(case.lengths)
    tensors = {
        "x": draw.activation(sum(case.lengths), channels),
        "weight": draw.normal(channels, width, scale=width**-0.5),
        "bias": draw.normal(channels) if case.bias else None,
        "initial_states": draw.normal(documents, channels, width) if case.initial_states else None,
    }
    options = {
        "layout": SequenceLayout.from_lengths(case.lengths, device),
        "activation": case.activation,
        "return_final_states": True,
    }
    return Inputs(tensors, options)
