"""Low-rank updates that a step computes itself: PEFT's beside projections, those of experts.

PEFT need not be installed: its layers are known by their names.
"""

from typing import Any

from torch import nn

from nemotron_v3.generation.plain import why_called
from nemotron_v3.layers.hooks import is_observed
from nemotron_v3.layers.moe.experts import NemotronV3Experts
from nemotron_v3.ops.decode_experts import Updates
from nemotron_v3.ops.skinny_linear import LowRank

FUSED = "nemotron_v3.hf.lora_linear", "FusedLoraLinear"


def is_update(module: nn.Module) -> bool:
    """Whether a module is PEFT's LoRA around a linear layer, or this package's form of it."""
    kind = type(module)
    of_peft = kind.__module__.startswith("peft.tuners.lora.") and kind.__name__ == "Linear"
    return of_peft or (kind.__module__, kind.__name__) == FUSED


def update_of(module: Any) -> LowRank | None:
    """What a layer adds to its weight, if `why_not_update` has nothing against it."""
    if not is_update(module):
        assert not hasattr(module, "lora_A"), f"{type(module).__name__} has to be called"
        return None
    if module.disable_adapters or module.merged:
        return None
    names = _active(module)
    if not names:
        return None
    a, b = module.lora_A[names[0]].weight, module.lora_B[names[0]].weight
    return LowRank(a.detach(), b.detach(), float(module.scaling[names[0]]))


def updates_of(moe: Any) -> Updates:
    """Those of a mixture of experts."""
    low, shared = moe.experts.low_rank, moe.shared_experts
    up = down = None
    if low is not None and not low.merged:
        up = LowRank(low.up_a.detach(), low.up_b.detach(), low.scale)
        down = LowRank(low.down_a.detach(), low.down_b.detach(), low.scale)
    if shared is None:
        return Updates(up, down)
    return Updates(up, down, update_of(shared.up_proj), update_of(shared.down_proj))


def why_not_update(module: Any) -> str | None:
    """Why an adapter of PEFT's has to be called, or None."""
    if is_observed(module) or any(map(is_observed, module.modules())):
        return "has hooks that must be called"
    if reason := why_called(module.base_layer):
        return reason
    names = _active(module)
    if module.disable_adapters or module.merged or not names:
        return None
    if len(names) > 1:
        return f"has {len(names)} active adapters"
    name = names[0]
    if name in module.lora_variant:
        return f"has an adapter that is more than LoRA ({type(module.lora_variant[name]).__name__})"
    if module.lora_B[name].bias is not None:
        return "has an adapter with a bias"
    dropout = module.lora_dropout[name]
    if dropout.training and getattr(dropout, "p", 0.0):
        return "has an adapter whose dropout is on (eval() turns it off)"
    for half in (module.lora_A[name], module.lora_B[name]):
        if type(half) is not nn.Linear or not half.weight.is_contiguous():
            return f"has an adapter of a {type(half).__name__}, not of a plain layer"
    if module.lora_A[name].weight.dtype != module.lora_B[name].weight.dtype:
        return "has an adapter of two dtypes"
    return None


def fixed_of(module: nn.Module) -> tuple[object, ...]:
    """What a capture keeps of a module's updates besides their addresses."""
    if is_update(module):
        update = update_of(module)
        return () if update is None else (update.a.data_ptr(), update.scale)
    if isinstance(module, NemotronV3Experts) and module.low_rank is not None:
        return module.low_rank.merged, module.low_rank.scale
    return ()


def _active(module: Any) -> list[str]:
    return [name for name in module.active_adapters if name in module.lora_A]
