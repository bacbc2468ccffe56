"""Shapes that the tests and benchmarks of ssd share."""

import math
from dataclasses import dataclass
from typing import Literal

import torch

from nemotron_v3.layout import SequenceLayout
from nemotron_v3.ops.common.cases import Draw, Inputs


@dataclass(frozen=True)
class Case:
    """`decay`: "usual" as after initialisation, "long" remembers thousands of tokens, "strong"
    forgets within one (`exp` of hundreds, which overflows where a form divides by decays),
    "mixed" has heads of both kinds."""

    name: str
    lengths: tuple[int, ...]
    heads: int
    head_dim: int
    groups: int
    state: int
    chunk_size: int = 128
    skip: bool = True  # D
    dt_bias: bool = True
    dt_limit: tuple[float, float] = (0.0, math.inf)
    initial_states: bool = False
    decay: Literal["usual", "long", "strong", "mixed"] = "usual"
    strided: bool = False


CASES = (
    Case("one-token", (1,), 3, 64, 1, 16, initial_states=True),
    Case("two", (2,), 8, 80, 8, 128, initial_states=True),
    Case("three", (3,), 5, 64, 1, 256, skip=False),
    Case("below-chunk", (127,), 33, 80, 1, 16),
    Case("chunk", (128,), 24, 64, 8, 16, dt_bias=False),
    Case("above-chunk", (129,), 17, 8, 1, 128, initial_states=True, strided=True),
    Case("wide-state", (37,), 16, 8, 8, 256, chunk_size=16),
    Case("thousand", (1000,), 33, 8, 1, 16, initial_states=True),
    Case("pack", (1, 0, 5, 1, 130, 3, 0), 24, 8, 8, 16, initial_states=True, strided=True),
    Case("small-chunks", (1, 7, 8, 9, 1, 17), 16, 16, 8, 16, chunk_size=8, initial_states=True),
    Case("batch", (40, 40, 40), 33, 8, 1, 16, chunk_size=16),
    Case("limits", (129,), 33, 8, 1, 16, dt_limit=(0.01, 0.05)),
    Case("long", (515,), 33, 8, 1, 16, decay="long", initial_states=True),
    Case("long-pack", (257, 1, 130), 24, 8, 8, 16, decay="long"),
    Case("strong", (130, 3), 33, 8, 1, 16, decay="strong", initial_states=True),
    Case("mixed", (200,), 32, 8, 1, 16, decay="mixed", initial_states=True),
    Case("all-empty", (0, 0), 8, 8, 8, 16, initial_states=True),
)


def make_inputs(
    case: Case, dtype: torch.dtype, device: torch.device | str, generator: torch.Generator
) -> Inputs:
    draw = Draw(generator, dtype, device, case.strided)
    tokens, heads, groups, state = sum(case.lengths), case.heads, case.groups, case.state
    states_shape = (len(case.lengths), heads, case.head_dim, state)
    tensors = {
        "x": draw.activation(tokens, heads, case.head_dim),
        "dt": draw.activation(tokens, heads),
        "A": draw_A(draw, heads, case.decay),
        "B": draw.activation(tokens, groups, state),
        "C": draw.activation(tokens, groups, state),
        "D": draw.uniform(heads, low=0.5, high=1.5, wide=True) if case.skip else None,
        "dt_bias": draw_dt_bias(draw, heads, case.decay) if case.dt_bias else None,
        "initial_states": draw.normal(*states_shape, wide=True) if case.initial_states else None,
    }
    options = {
        "dt_limit": case.dt_limit,
        "layout": SequenceLayout.from_lengths(case.lengths, device),
        "chunk_size": case.chunk_size,
    }
    return Inputs(tensors, options)


def draw_A(draw: Draw, heads: int, decay: str) -> torch.Tensor:
    """-A between 1 and 16 as after training; 1e-3 remembers for long, 300 not at all."""
    A = -draw.uniform(heads, low=1.0, high=16.0, wide=True)
    if decay == "long":
        return A * 1e-3
    if decay == "strong":
        return A * 50
    if decay == "mixed":
        A[::2] *= 1e-3
        A[1::4] *= 50
    return A


def draw_dt_bias(draw: Draw, heads: int, decay: str) -> torch.Tensor:
    """Steps log-uniform in [1e-3, 0.1] at dt = 0, as at initialisation; around 1 where strong."""
    if decay == "strong":
        return draw.normal(heads, wide=True)
    step = draw.uniform(heads, low=math.log(1e-3), high=math.log(0.1), wide=True).exp()
    return step + torch.log(-torch.expm1(-step))  # inverse of softplus
