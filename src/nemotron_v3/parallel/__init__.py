"""Turns a model of one device into one that several share, from outside."""

from nemotron_v3.parallel.fsdp import shard_model
from nemotron_v3.parallel.gradients import clip_gradients_, gradient_norm, total_norm
from nemotron_v3.parallel.groups import by_mesh
from nemotron_v3.parallel.parallelize import parallelize
from nemotron_v3.parallel.plan import Plan

__all__ = [
    "Plan",
    "by_mesh",
    "clip_gradients_",
    "gradient_norm",
    "parallelize",
    "shard_model",
    "total_norm",
]
