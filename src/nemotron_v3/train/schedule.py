"""The learning rate over a training: a warm-up, then a decay."""

import math
from collections.abc import Callable

import torch
from torch.optim.lr_scheduler import LambdaLR

from nemotron_v3.train.options import ScheduleOptions


def scale(options: ScheduleOptions, done: float) -> float:
    """The factor of the learning rate when this fraction of the training is done, above 0."""
    if done < options.warmup:
        return max(done / options.warmup, options.least)
    left = (1 - done) / (1 - options.warmup) if done < 1 else 0.0
    shapes = {
        "constant": 1.0,
        "linear": left,
        "cosine": (1 - math.cos(math.pi * left)) / 2,
        "stable-decay": min(1.0, (1 - done) / options.decay) if done < 1 else 0.0,
    }
    falling = shapes[options.shape]
    # Stable-decay falls to the least in a straight line, as the linear shape does.
    return max(falling, options.least)


def make_scheduler(
    optimizer: torch.optim.Optimizer,
    options: ScheduleOptions,
    highest: float,
    done: Callable[[int], float],
    step: int = 0,
) -> LambdaLR:
    """PyTorch's scheduler, behind `step` steps.

    `done` is the fraction of the training behind the middle of a step, by the number of steps
    before it.
    """
    for group in optimizer.param_groups:
        group["initial_lr"] = highest
    return LambdaLR(optimizer, lambda n: scale(options, done(n)), last_epoch=step - 1)
