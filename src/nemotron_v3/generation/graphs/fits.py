"""Which models a step on fixed buffers knows."""

import functools
import logging
from typing import Any

import torch
from torch import nn

from nemotron_v3.generation.graphs.plan import Plan
from nemotron_v3.generation.graphs.slots import MOST_ENDS
from nemotron_v3.generation.graphs.updates import is_update, why_not_update
from nemotron_v3.generation.plain import why_called
from nemotron_v3.layers.moe.moe import NemotronV3MoE
from nemotron_v3.layers.moe.router import NemotronV3Router
from nemotron_v3.model.protocol import CausalLM
from nemotron_v3.ops.common import host

_log = logging.getLogger("nemotron_v3")


def why_not(model: CausalLM, ends: int = 0) -> str | None:
    """Why `forward` has to run the steps of generation, or None where one CUDA graph can.

    Args:
        ends: how many tokens end a row.
    """
    weight = model.model.embeddings.weight
    if weight.device.type != "cuda":
        return f"the model is on {weight.device}, and a CUDA graph needs an NVIDIA GPU"
    if not host.installed():
        return "the package triton is not installed"
    if weight.dtype not in host.DTYPES:
        return f"the model is in {weight.dtype}, and the kernels of a step compute in fp32"
    if ends > MOST_ENDS:
        return f"{ends} tokens end a row, and a graph knows {MOST_ENDS} at most"
    if torch.is_autocast_enabled(weight.device.type):
        return "autocast is on"
    backend = model.model.backend
    if backend.impl not in ("auto", "triton"):
        return f"the model's backend asks for impl={backend.impl!r}"
    if (backend.attn, backend.linear) != ("sdpa", "torch"):
        return "the model's backend asks for other layers than the plain ones"
    return why_not_layers(model) or _why_not_tensors(model, weight)


def why_not_layers(model: CausalLM) -> str | None:
    """Why no graph can do the work of the model's modules, or None."""
    for number, block in enumerate(model.model.layers):
        if not Plan.knows(block.block_type):
            return f"layer {number} is a block of type {block.block_type!r}, which no graph knows"
    return _why_not_modules(model, "the model")


def say_once(reason: str, device: torch.device) -> None:
    """Warn that `forward` decodes on a GPU, which would be faster by a graph."""
    if device.type == "cuda":
        _say_once(reason)


@functools.cache
def _say_once(reason: str) -> None:
    _log.warning("generation: forward decodes, and not a CUDA graph: %s", reason)


def _why_not_modules(module: Any, name: str, path: str = "") -> str | None:
    """Of a module and all that it holds; an adapter is looked at as a whole."""
    if is_update(module):
        reason = why_not_update(module)
        return f"{name} {reason}" if reason else None
    reason = why_called(module, updates=True)
    if reason is None and isinstance(module, NemotronV3MoE):
        reason = _why_not_moe(module)
    if reason is not None:
        return f"{name} {reason}"
    for part, child in module.named_children():
        if reason := _why_not_modules(child, f"{path}{part}", f"{path}{part}."):
            return reason
    return None


def _why_not_moe(moe: NemotronV3MoE) -> str | None:
    if type(moe.gate) is not NemotronV3Router or moe.gate.observed:
        return "has a router that is watched, or routes evenly"
    if moe.shared_experts is not None and moe.shared_experts.up_proj.bias is not None:
        return "has a shared expert with a bias"
    return None


def _why_not_tensors(model: CausalLM, like: torch.Tensor) -> str | None:
    wide = {like.dtype, torch.float32}
    for name, parameter in model.named_parameters():
        if type(parameter) is not nn.Parameter:
            return f"{name} is a {type(parameter).__name__}"
        if parameter.device != like.device or not parameter.is_contiguous():
            return f"{name} is on {parameter.device}, or not contiguous"
        stack = parameter.dim() == 3 and ".low_rank." not in name
        if parameter.dtype not in wide or (stack and parameter.dtype != like.dtype):
            return f"{name} is in {parameter.dtype}, the model in {like.dtype}"
    return None
