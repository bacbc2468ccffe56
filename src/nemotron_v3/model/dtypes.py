"""Which dtype each tensor of the model has in memory: one table."""

import torch

from nemotron_v3.layers.fp32_params import at_least_fp32
from nemotron_v3.layers.mamba2 import NemotronV3Mamba2Mixer
from nemotron_v3.layers.moe import NemotronV3Router

FP32_NAMES = (*NemotronV3Mamba2Mixer.fp32_tensors, *NemotronV3Router.fp32_tensors)
"""Last parts of the names of tensors that are fp32 or wider whatever the model's dtype is."""


def memory_dtype(name: str, model_dtype: torch.dtype) -> torch.dtype:
    """The dtype of the parameter or buffer `name` in a model of `model_dtype`."""
    last = name.rsplit(".", 1)[-1]
    return at_least_fp32(model_dtype) if last in FP32_NAMES else model_dtype
