"""Targets of LoRA adapters by what they are for, and what they match in a model.

Targets are spelled as PEFT reads them: a target matches every module whose name is the target or
ends with `.target`; one text in place of a list is a regular expression for whole names. Names are
those in memory, which transformers' models and this package's share.
"""

import difflib
import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from types import MappingProxyType

import torch
from torch import nn

from nemotron_v3.config import NemotronV3Config
from nemotron_v3.model.model import NemotronV3ForCausalLM


@dataclass(frozen=True)
class Group:
    """Weights with one purpose: `modules` and `parameters` as targets, and why one adapts them, or
    does not unless asked."""

    modules: tuple[str, ...]
    why: str
    parameters: tuple[str, ...] = ()
    default: bool = True


GROUPS: Mapping[str, Group] = MappingProxyType(
    {
        "attention": Group(
            ("q_proj", "k_proj", "v_proj", "o_proj"), "all four projections of attention"
        ),
        "mamba": Group(
            ("in_proj", "out_proj"),
            "both projections of the Mamba-2 mixer; between them nothing is a matrix product with "
            "a weight",
        ),
        "mlp": Group(("mixer.up_proj", "mixer.down_proj"), "the MLP blocks of models without MoE"),
        "shared": Group(
            ("shared_experts.up_proj", "shared_experts.down_proj"),
            "the expert that every token passes",
        ),
        "latent": Group(
            ("fc1_latent_proj", "fc2_latent_proj"),
            "what stands before and behind the routed experts, for every token",
        ),
        "routed": Group(
            (),
            "most of a model's weights; each expert sees a few tokens, and an adapter of rank r "
            "takes r ranks for each of them",
            parameters=("experts.up_proj", "experts.down_proj"),
            default=False,
        ),
        "router": Group(
            (),
            "its choice is not continuous: a small change sends tokens to experts, and past a load "
            "balance, that stay as they were trained",
            parameters=("gate.weight",),
            default=False,
        ),
        "head": Group(
            ("lm_head",),
            "an adapter of it is as wide as the vocabulary, and may belong to the embeddings too",
            default=False,
        ),
    }
)
"""What can be adapted, by purpose; `default` says which are where nothing is asked."""

DEFAULT_GROUPS: tuple[str, ...] = tuple(name for name, group in GROUPS.items() if group.default)


@dataclass(frozen=True)
class LoraTargets:
    """Targets of one adapter: `modules` for PEFT's `target_modules`, `parameters` for its
    `target_parameters`."""

    modules: tuple[str, ...]
    parameters: tuple[str, ...] = ()


Targets = LoraTargets | str | Iterable[str]


def lora_targets(
    model: nn.Module | NemotronV3Config, groups: Sequence[str] | None = None
) -> LoraTargets:
    """The targets of `groups` that a model has.

    Args:
        model: a model of this package or of transformers, an adapted one included, or a config.
        groups: names in `GROUPS`. None is `DEFAULT_GROUPS`: attention, Mamba, MLP, shared experts
            and latent projections. The router, the head and the routed experts have to be asked
            for; `GROUPS[name].why` says why.

    Raises:
        ValueError: a group that is not there, or that the model has nothing of.
    """
    asked = DEFAULT_GROUPS if groups is None else tuple(groups)
    for name in asked:
        if name not in GROUPS:
            near = difflib.get_close_matches(name, GROUPS, n=1, cutoff=0.0)[0]
            raise ValueError(
                f"no group {name!r}: did you mean {near!r}? There are {', '.join(GROUPS)}"
            )
    model = skeleton(model)
    held = {name: _held(model, GROUPS[name]) for name in asked}
    empty = [name for name, targets in held.items() if not targets.modules + targets.parameters]
    if empty and (groups is not None or len(empty) == len(asked)):
        there = [name for name, group in GROUPS.items() if any(vars(_held(model, group)).values())]
        raise ValueError(
            f"the model has nothing of {', '.join(empty)}: it has {', '.join(there) or 'no group'}"
        )
    return LoraTargets(
        modules=tuple(target for targets in held.values() for target in targets.modules),
        parameters=tuple(target for targets in held.values() for target in targets.parameters),
    )


def skeleton(model: nn.Module | NemotronV3Config) -> nn.Module:
    """`model`, or the model of a config without storage."""
    if isinstance(model, nn.Module):
        return model
    with torch.device("meta"):
        return NemotronV3ForCausalLM(NemotronV3Config.from_any(model))


def _held(model: nn.Module, group: Group) -> LoraTargets:
    modules, parameters = projections(model), stacks(model)
    return LoraTargets(
        tuple(target for target in group.modules if any(_ends(n, target) for n in modules)),
        tuple(target for target in group.parameters if any(_ends(n, target) for n in parameters)),
    )


def projections(model: nn.Module) -> dict[str, nn.Module]:
    """The modules that a low-rank adapter can stand beside, by the name they have without
    adapters: linear layers, quantised ones too, and embeddings."""
    return {
        plain_name(name): module
        for name, module in model.named_modules()
        if (hasattr(module, "in_features") or isinstance(module, nn.Embedding))
        # Not the adapters' own layers, nor PEFT's around a parameter.
        and not re.search(r"\.lora_\w+", name)
        and not hasattr(module, "parameter_name")
    }


def stacks(model: nn.Module) -> dict[str, nn.Parameter]:
    """The weights that are no module's, by the name they have without adapters: stacks of experts
    and routers. PEFT adapts them as parameters."""
    return {
        plain_name(name): parameter
        for name, parameter in model.named_parameters()
        if re.search(r"(\.|^)(experts\.(base_layer\.)*(up|down)_proj|gate\.(base_layer\.)*weight)$",
                     name)
    }  # fmt: skip


def plain_name(name: str) -> str:
    """The name of a module or parameter in the model that an adapter was put on."""
    name = name.removeprefix("base_model.model.")
    return re.sub(r"\.(base_layer|modules_to_save\.\w+|original_module)(?=\.|$)", "", name)


def matches(names: Iterable[str], targets: str | Iterable[str]) -> dict[str, list[str]]:
    """Which of `names` each target matches, as PEFT does it."""
    names = list(names)
    if isinstance(targets, str):
        return {targets: [name for name in names if re.fullmatch(targets, name)]}
    return {target: [name for name in names if _ends(name, target)] for target in targets}


def _ends(name: str, target: str) -> bool:
    return name == target or name.endswith(f".{target}")


def resolve(model: nn.Module, targets: Targets) -> tuple[list[str], list[str]]:
    """The names of modules and of parameters that `targets` match, in the order of the model.

    Raises `ValueError` naming every target that matches nothing, with the nearest names.
    """
    if isinstance(targets, LoraTargets):
        modules, parameters = targets.modules, targets.parameters
    else:
        modules, parameters = targets, ()
    there, stacked = list(projections(model)), list(stacks(model))
    found = matches(there, modules)
    found_parameters = matches(stacked, parameters)
    problems = [
        _no_match(t, there, stacked, "it is a parameter: give it in LoraTargets(parameters=...)")
        for t, names in found.items()
        if not names
    ]
    problems += [
        _no_match(t, stacked, there, "it is a module: give it in LoraTargets(modules=...)")
        for t, names in found_parameters.items()
        if not names
    ]
    if problems:
        raise ValueError("\n".join(problems))
    hit = {name for names in found.values() for name in names}
    hit_parameters = {name for names in found_parameters.values() for name in names}
    if not hit | hit_parameters:
        raise ValueError(f"no targets were given: the model has {', '.join(_ways(there))}")
    return [n for n in there if n in hit], [n for n in stacked if n in hit_parameters]


def _no_match(target: str, names: list[str], others: list[str], wrong: str) -> str:
    """What to say where `target` matches none of `names`; `wrong` is said if one of `others`."""
    ways = _ways(names)
    tail = target.rpartition(".")[2]
    near = difflib.get_close_matches(target, ways, n=2, cutoff=0.5)
    near = near or difflib.get_close_matches(tail, ways, n=2, cutoff=0.5)
    meant = f"did you mean {' or '.join(map(repr, near))}? " if near else ""
    hint = f"{wrong}. " if any(_ends(name, target) for name in others) else ""
    return f"the target {target!r} matches nothing: {hint}{meant}The model has {', '.join(ways)}"


def _ways(names: Iterable[str]) -> list[str]:
    """The shortest way to target each of `names` apart from the others: `q_proj`,
    `shared_experts.up_proj`."""
    generic = list(dict.fromkeys(re.sub(r"(^|.*\.)layers\.\d+\.", "", name) for name in names))
    leaves = [name.rpartition(".")[2] for name in generic]
    return [
        leaf if leaves.count(leaf) == 1 else ".".join(name.split(".")[-2:])
        for name, leaf in zip(generic, leaves, strict=True)
    ]
