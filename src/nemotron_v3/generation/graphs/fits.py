"""Which models and caches a step on fixed buffers knows."""

import torch
from torch import nn

from nemotron_v3.cache import NemotronHybridCache
from nemotron_v3.layers.hooks import is_observed
from nemotron_v3.layers.moe.dispatcher import LocalDispatcher
from nemotron_v3.layers.moe.moe import NemotronV3MoE
from nemotron_v3.layers.moe.router import NemotronV3Router
from nemotron_v3.model.protocol import CausalLM
from nemotron_v3.ops.common import host

PLAIN_LAYERS = ("nemotron_v3.layers.", "nemotron_v3.model.")
PLAIN_TORCH = (nn.Linear, nn.Conv1d, nn.Embedding, nn.ModuleList)


def why_not(model: CausalLM, cache: NemotronHybridCache | None = None) -> str | None:
    """Why `forward` has to run the steps of generation, or None where one CUDA graph can."""
    weight = model.model.embeddings.weight
    if weight.device.type != "cuda":
        return f"the model is on {weight.device}, and a CUDA graph needs an NVIDIA GPU"
    if not host.installed():
        return "the package triton is not installed"
    if weight.dtype not in host.DTYPES:
        return f"the model is in {weight.dtype}, and the kernels of a step compute in fp32"
    if cache is not None and cache.rollback_window:
        return "the cache keeps earlier states (rollback_window)"
    if torch.is_autocast_enabled(weight.device.type):
        return "autocast is on"
    backend = model.model.backend
    if backend.impl not in ("auto", "triton"):
        return f"the model's backend asks for impl={backend.impl!r}"
    if (backend.attn, backend.linear) != ("sdpa", "torch"):
        return "the model's backend asks for other layers than the plain ones"
    for name, module in model.named_modules():
        if reason := _why_not_module(module):
            return f"{name or 'the model'} {reason}"
    return _why_not_tensors(model, weight)


def _why_not_module(module: nn.Module) -> str | None:
    if is_observed(module):
        return "has hooks, or another forward, that must be called"
    kind = type(module)
    if kind not in PLAIN_TORCH and not kind.__module__.startswith(PLAIN_LAYERS):
        return f"is a {kind.__name__}, not the plain layer"
    low_rank = getattr(module, "low_rank", None)
    if low_rank is not None and not low_rank.merged:
        return "has an adapter that is not merged"
    if isinstance(module, NemotronV3MoE):
        return _why_not_moe(module)
    return None


def _why_not_moe(moe: NemotronV3MoE) -> str | None:
    if type(moe.gate) is not NemotronV3Router or moe.gate.observed:
        return "has a router that is watched, or routes evenly"
    if type(moe.dispatcher) is not LocalDispatcher:
        return "sends its tokens elsewhere"
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
        if parameter.dtype not in wide or (parameter.dim() == 3 and parameter.dtype != like.dtype):
            return f"{name} is in {parameter.dtype}, the model in {like.dtype}"
    return None
