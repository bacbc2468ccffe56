"""Which parameters weight decay acts on, and which are matrices between hidden states."""

from typing import Any

from torch import nn

from nemotron_v3.layers.block import NemotronV3Block
from nemotron_v3.layers.moe import NemotronV3Experts
from nemotron_v3.model.dtypes import FP32_NAMES


def parameter_groups(model: nn.Module, weight_decay: float) -> list[dict[str, Any]]:
    """Two groups for an optimiser: with weight decay, and without.

    Decay pulls a matrix towards doing nothing. On `A_log`, `D`, `dt_bias`, norm weights and biases
    it would change time scales and gains instead, so those get none.

    Args:
        model: any module; parameters that are frozen are left out.
        weight_decay: of the first group, not negative.

    Returns:
        `[{"params": [...], "weight_decay": weight_decay}, {"params": [...], "weight_decay": 0.0}]`.

    Raises:
        ValueError: a negative weight decay.
        TypeError: no module.
    """
    if not isinstance(model, nn.Module):
        raise TypeError(f"a {type(model).__name__} has no parameters to group: give a model")
    if weight_decay < 0:
        raise ValueError(f"weight_decay must not be negative, got {weight_decay}")
    decayed, kept = [], []
    for name, parameter in model.named_parameters():
        if parameter.requires_grad:
            matrix = parameter.dim() > 1 and name.rsplit(".", 1)[-1] not in FP32_NAMES
            (decayed if matrix else kept).append(parameter)
    return [
        {"params": decayed, "weight_decay": weight_decay},
        {"params": kept, "weight_decay": 0.0},
    ]


def hidden_matrices(model: nn.Module) -> list[nn.Parameter]:
    """The trainable matrices that take a hidden state to another one: projections `[out, in]` and
    stacks of experts `[E, out, in]` of a model's blocks, in the order of its parameters.

    Embeddings and a head speak of tokens, a router of experts, a convolution of channels: rows of
    theirs are no directions of one space.
    """
    return [
        parameter
        for block in model.modules()
        if isinstance(block, NemotronV3Block)
        for module in block.modules()
        if isinstance(module, nn.Linear | NemotronV3Experts)
        for parameter in module.parameters(recurse=False)
        if parameter.requires_grad and parameter.dim() > 1
    ]
