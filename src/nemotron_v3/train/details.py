"""What a step tells about the inside of a model: gradients by kind of block, experts' loads."""

import re
import sys
from typing import Any

import torch
from torch import Tensor

from nemotron_v3.config import NemotronV3Config
from nemotron_v3.layers.moe.load_balancing import ExpertLoad
from nemotron_v3.model.model import NemotronV3ForCausalLM
from nemotron_v3.parallel import total_norm
from nemotron_v3.train.loop import Trainer
from nemotron_v3.train.processes import World

_LAYER = re.compile(r"(?:.*\.)?layers\.(\d+)\.mixer\.(.*)")


def kind_of(name: str, config: NemotronV3Config) -> str:
    """The kind of block that a parameter belongs to; a moe block is router, experts and shared."""
    if match := _LAYER.fullmatch(name):
        block = config.layers_block_type[int(match[1])]
        if block != "moe":
            return block
        part = match[2].partition(".")[0]
        return {"gate": "router", "experts": "experts", "shared_experts": "shared"}.get(part, "moe")
    return next((kind for kind in ("embeddings", "lm_head") if kind in name), "norms")


def look(trainer: Trainer) -> dict[str, Any]:
    """Of the gradients and counts at hand, on all processes: each has to call it."""
    norms = gradient_norms(trainer.model)
    told: dict[str, Any] = {f"gradient_norm/{kind}": norm for kind, norm in norms.items()}
    if trainer.load is not None:
        told |= _loads(trainer.load, trainer.world)
    return told | {"memory_bytes": memory_in_use(trainer.world.device)}


def gradient_norms(model: NemotronV3ForCausalLM) -> dict[str, float]:
    """The norm of the gradients of each kind of block, before clipping."""
    kinds: dict[str, list[Tensor]] = {}
    for name, parameter in model.named_parameters():
        if parameter.grad is not None:
            kinds.setdefault(kind_of(name, model.config), []).append(parameter.grad)
    return {kind: total_norm(grads).item() for kind, grads in kinds.items()}


def _loads(load: ExpertLoad, world: World) -> dict[str, Any]:
    """Evenness of the experts' loads: mean over the routers of the entropy (1 is even), the worst
    of the most loaded expert's excess, all idle experts; entropy and excess of each router by its
    layer's number, and the load of each expert in percent of an even one."""
    names = sorted(load.counts)
    share = world.sum_(torch.stack([load.counts[name] for name in names])).double()
    share /= share.sum(1, keepdim=True).clamp(min=1)
    experts = share.shape[1]
    even = torch.tensor(float(max(experts, 2)), dtype=torch.float64).log().item()
    entropies = (torch.special.entr(share).sum(1) / even).tolist()
    loads = (share * experts).tolist()
    routers = {_layer_of(name): i for i, name in enumerate(names)}
    told: dict[str, Any] = {
        "experts/entropy": sum(entropies) / len(entropies),
        "experts/max_violation": max(map(max, loads)) - 1,
        "experts/idle": float((share == 0).sum().item()),
    }
    for layer, i in routers.items():
        told[f"experts/entropy/{layer}"] = entropies[i]
        told[f"experts/max_violation/{layer}"] = max(loads[i]) - 1
    told["experts/load"] = {k: [round(100 * x) for x in loads[i]] for k, i in routers.items()}
    return told


def _layer_of(router: str) -> str:
    """The number of a router's layer; its whole name where that has none."""
    match = _LAYER.fullmatch(router)
    return match[1] if match else router


def memory_in_use(device: torch.device) -> int:
    """The most bytes at once so far: on the GPU, or resident ones of this process."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device)
    try:
        import resource
    except ImportError:  # Windows
        return 0
    unit = 1 if sys.platform == "darwin" else 1024
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit
