"""Shapes that the tests and benchmarks of mamba2 share."""

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch

from nemotron_v3.layout import SequenceLayout
from nemotron_v3.ops.common.cases import Draw, Inputs
from nemotron_v3.ops.ssd.cases import draw_A, draw_dt_bias


@dataclass(frozen=True)
class Case:
    name: str
    lengths: tuple[int, ...]
    heads: int
    head_dim: int
    groups: int
    state: int
    width: int = 4
    chunk_size: int = 128
    conv_bias: bool = True
    dt_limit: tuple[float, float] = (0.0, math.inf)
    states: bool = False
    decay: str = "usual"

    @property
    def inner(self) -> int:
        return self.heads * self.head_dim

    @property
    def conv_dim(self) -> int:
        return self.inner + 2 * self.groups * self.state


CASES = (
    Case("one-token", (1,), 8, 64, 1, 16, states=True),
    Case("three", (3,), 8, 80, 8, 128, conv_bias=False),
    Case("above-chunk", (129,), 33, 8, 1, 16),
    Case("pack", (1, 0, 5, 1, 40, 3), 24, 8, 8, 16, width=3, chunk_size=16, states=True),
    Case("batch", (17, 17), 33, 8, 3, 16, width=8, chunk_size=8, dt_limit=(0.01, 0.05)),
    Case("long", (200,), 32, 8, 1, 16, states=True, decay="long"),
)


def make_inputs(
    case: Case, dtype: torch.dtype, device: torch.device | str, generator: torch.Generator
) -> Inputs:
    draw = Draw(generator, dtype, device)
    tokens, documents, heads = sum(case.lengths), len(case.lengths), case.heads
    conv_dim, width = case.conv_dim, case.width
    ssm_shape = (documents, heads, case.head_dim, case.state)
    tensors = {
        "zxbcdt": draw.normal(tokens, case.inner + conv_dim + heads),
        "conv_weight": draw.normal(conv_dim, width, scale=width**-0.5),
        "conv_bias": draw.normal(conv_dim) if case.conv_bias else None,
        "dt_bias": draw_dt_bias(draw, heads, case.decay),
        "A_log": draw_A(draw, heads, case.decay).neg().log(),
        "D": draw.uniform(heads, low=0.5, high=1.5, wide=True),
        "norm_weight": draw.uniform(case.inner, low=0.5, high=1.5),
        "conv_states": draw.normal(documents, conv_dim, width) if case.states else None,
        "ssm_states": draw.normal(*ssm_shape, wide=True) if case.states else None,
    }
    options = {
        "n_groups": case.groups,
        "head_dim": case.head_dim,
        "state_size": case.state,
        "chunk_size": case.chunk_size,
        "dt_limit": case.dt_limit,
        "eps": 1e-5,
        "layout": SequenceLayout.from_lengths(case.lengths, device),
    }
    return Inputs(tensors, options)


def of_one_token(step: Callable) -> Callable:
    """`mamba2`'s arguments and results for `mamba2_step`, which updates its states in place."""

    def run(
        *,
        conv_states: torch.Tensor,
        ssm_states: torch.Tensor,
        layout: Any,
        chunk_size: int,
        **arguments: Any,
    ) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        conv_state, ssm_state = conv_states.clone(), ssm_states.clone()
        y = step(**arguments, conv_state=conv_state, ssm_state=ssm_state)
        return y, conv_state, ssm_state

    return run
