"""The optimiser that a run's options ask for."""

import functools
from typing import Any

import torch
from torch import nn

from nemotron_v3.model.optim import hidden_matrices, parameter_groups
from nemotron_v3.train.eight_bit import EightBitAdamW
from nemotron_v3.train.muon import Muon
from nemotron_v3.train.optimizer import RoundedAdamW
from nemotron_v3.train.options import OptimizerOptions


def make_optimizer(model: nn.Module, options: OptimizerOptions, seed: int) -> torch.optim.Optimizer:
    """The optimiser of a model's trainable parameters; made after they were sharded.

    Raises:
        ValueError: moments of 8 bits with fp32 masters, or without torchao.
    """
    groups = parameter_groups(model, options.weight_decay)
    if options.kind == "muon":
        groups = _matrices_apart(groups, hidden_matrices(model))
    groups = [group for group in groups if group["params"]]
    common: dict[str, Any] = {"lr": options.learning_rate, "betas": options.betas}
    narrow = any(p.dtype == torch.bfloat16 for group in groups for p in group["params"])
    kind = RoundedAdamW
    if options.kind == "muon":
        kind = functools.partial(Muon, momentum=options.momentum)
    elif options.moments == "8bit":
        kind = EightBitAdamW
        if narrow and options.bf16_weights == "master":
            raise ValueError(
                "optimizer.moments = '8bit' saves memory and bf16_weights = 'master' spends it: "
                "give bf16_weights = 'stochastic'"
            )
    elif not narrow:
        # PyTorch updates tensors of several meshes one by one alone.
        meshes = {getattr(p, "device_mesh", None) for group in groups for p in group["params"]}
        fused = len(meshes) == 1
        return torch.optim.AdamW(groups, **common, eps=options.eps, fused=fused, foreach=False)
    names = {parameter: name for name, parameter in model.named_parameters()}
    return kind(
        groups, **common, eps=options.eps, rounding=options.bf16_weights, names=names, seed=seed
    )


def _matrices_apart(
    groups: list[dict[str, Any]], matrices: list[nn.Parameter]
) -> list[dict[str, Any]]:
    """The groups without these parameters, which have one of their own with the first's decay."""
    apart = set(matrices)
    rest = [g | {"params": [p for p in g["params"] if p not in apart]} for g in groups]
    return [groups[0] | {"params": matrices, "matrices": True}, *rest]
