"""Shapes that the tests and benchmarks of cross_entropy share."""

from dataclasses import dataclass

import torch

from nemotron_v3.ops.common.cases import Draw, Inputs


@dataclass(frozen=True)
class Case:
    name: str
    tokens: int
    vocabulary: int
    ignored: float = 0.0  # the share of tokens without a target
    scale: float = 1.0  # of the logits
    ignore_index: int = -100


CASES = (
    Case("one-token", 1, 67),
    Case("some-ignored", 127, 257, ignored=0.3),
    Case("other-index", 65, 128, ignored=0.3, ignore_index=-1),
    Case("large-logits", 64, 1000, scale=50.0),
    Case("none-left", 5, 33, ignored=1.0),
    Case("no-tokens", 0, 33),
)


def make_inputs(
    case: Case, dtype: torch.dtype, device: torch.device | str, generator: torch.Generator
) -> Inputs:
    draw = Draw(generator, dtype, device)
    targets = draw.integers(case.tokens, high=case.vocabulary)
    dropped = draw.uniform(case.tokens, low=0.0, high=1.0, wide=True) < case.ignored
    options = {
        "targets": targets.masked_fill(dropped, case.ignore_index),
        "ignore_index": case.ignore_index,
    }
    return Inputs({"logits": draw.normal(case.tokens, case.vocabulary, scale=case.scale)}, options)
