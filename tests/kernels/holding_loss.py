"""How the Triton form of linear cross entropy is held to the accuracy rule, wherever it runs."""

from functools import partial

import torch

from nemotron_v3 import ops
from nemotron_v3.ops.linear_cross_entropy import cases, reference
from tests.accuracy import PlainPyTorch, Report, check


def hold_loss(case: cases.Case, dtype: torch.dtype, device: str) -> Report:
    """The logits of the mean loss are the head's, in its dtype: plain PyTorch's are rounded too."""
    truth = reference.linear_cross_entropy
    return check(
        partial(ops.linear_cross_entropy, impl="triton"),
        truth,
        lambda generator: cases.make_inputs(case, dtype, device, generator),
        dtype=dtype,
        plain=PlainPyTorch(truth, dtype, results=dtype != torch.float32),
    )


def hold_log_probabilities(case: cases.Case, dtype: torch.dtype, device: str) -> Report:
    """Its logits are fp32."""

    def make_inputs(generator: torch.Generator):
        inputs = cases.make_inputs(case, dtype, device, generator)
        del inputs.options["z_loss"]
        return inputs

    truth = reference.linear_log_probabilities
    function = partial(ops.linear_log_probabilities, impl="triton")
    return check(function, truth, make_inputs, dtype=dtype)
