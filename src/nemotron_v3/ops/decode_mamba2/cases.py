"""Shapes that the tests and benchmarks of decode_mamba2 share."""

import math
from dataclasses import dataclass

import torch

from nemotron_v3.ops.common.cases import Draw, Inputs
from nemotron_v3.ops.ssd.cases import draw_A, draw_dt_bias


@dataclass(frozen=True)
class Case:
    """`held` tokens of each slot; a negative number is a slot that is not active, with so many."""

    name: str
    held: tuple[int, ...]
    heads: int
    head_dim: int
    groups: int
    state: int
    width: int = 4
    conv_bias: bool = True
    dt_limit: tuple[float, float] = (0.0, math.inf)
    decay: str = "usual"

    @property
    def inner(self) -> int:
        return self.heads * self.head_dim

    @property
    def conv_dim(self) -> int:
        return self.inner + 2 * self.groups * self.state


CASES = (
    Case("one-slot", (5,), 8, 64, 1, 16),
    Case("first-tokens", (0, 1, 2, 3, 4), 4, 16, 2, 16),
    Case("idle-slots", (-3, 7, 0, -1, 1000), 6, 16, 3, 128),
    Case("odd", (9, -2, 1), 6, 24, 3, 20, width=3, conv_bias=False),
    Case("eight-taps", (2, 30), 4, 8, 1, 16, width=8, dt_limit=(0.01, 0.05)),
    Case("long-decay", (4, 17), 12, 8, 1, 16, decay="long"),
    Case("none-active", (-1, -4), 2, 16, 1, 16),
)


def make_inputs(
    case: Case, dtype: torch.dtype, device: torch.device | str, generator: torch.Generator
) -> Inputs:
    draw = Draw(generator, dtype, device)
    rows, heads, width = len(case.held), case.heads, case.width
    conv = draw.normal(rows, width, case.conv_dim)
    positions = torch.tensor([abs(n) for n in case.held], device=device)
    for row, held in enumerate(case.held):
        conv[row, abs(held) :] = 0  # nothing came before the first token
    tensors = {
        "projected": draw.activation(rows, case.inner + case.conv_dim + heads),
        "conv": conv,
        "ssm": draw.normal(rows, heads, case.head_dim, case.state, wide=True),
        "conv_weight": draw.normal(case.conv_dim, width, scale=width**-0.5),
        "conv_bias": draw.normal(case.conv_dim) if case.conv_bias else None,
        "dt_bias": draw_dt_bias(draw, heads, case.decay),
        "A_log": draw_A(draw, heads, case.decay).neg().log(),
        "D": draw.uniform(heads, low=0.5, high=1.5, wide=True),
    }
    options = {
        "positions": positions,
        "active": torch.tensor([n >= 0 for n in case.held], device=device),
        "n_groups": case.groups,
        "dt_limit": case.dt_limit,
    }
    return Inputs(tensors, options)
