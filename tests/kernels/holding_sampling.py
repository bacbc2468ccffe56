"""How the forms of sampling are compared, wherever they run."""

import math
from typing import Any

import torch
from torch import Tensor

from nemotron_v3 import ops
from nemotron_v3.ops.sampling import cases

CHANGED = ("drawn", "seen", "logprobs", "out")


def draws(case: cases.Case, dtype: torch.dtype, device: str, seed: int) -> dict[str, Any]:
    generator = torch.Generator().manual_seed(seed)
    inputs = cases.make_inputs(case, dtype, device, generator)
    return inputs.tensors | inputs.options


def sampled(given: dict[str, Any], impl: str, steps: int = 3) -> dict[str, Tensor]:
    """Tokens `[steps, R]` of some steps on the same logits, and what has changed."""
    mine = {k: t.clone() if k in CHANGED and t is not None else t for k, t in given.items()}
    tokens = [ops.sample(**mine, impl=impl).clone() for _ in range(steps)]
    return {"tokens": torch.stack(tokens)} | {k: mine[k] for k in CHANGED if mine[k] is not None}


def hold(
    case: cases.Case,
    dtype: torch.dtype,
    device: str,
    impl: str,
    *,
    draws_of: int = 5,
    steps: int = 3,
) -> None:
    """Tokens and bookkeeping of the reference; log-probabilities within two roundings of it."""
    for seed in range(draws_of):
        given = draws(case, dtype, device, seed)
        true, ours = sampled(given, "reference", steps), sampled(given, impl, steps)
        for name in ("tokens", "drawn", "seen", "out"):
            assert name not in true or torch.equal(true[name], ours[name]), (name, seed)
        # A difference of a logit and of the logarithm of their sum, in fp32.
        size = given["logits"].abs().max().float() + math.log(case.vocabulary)
        error = (ours["logprobs"] - true["logprobs"]).abs().max()
        assert error <= 2 * torch.finfo(torch.float32).eps * size
