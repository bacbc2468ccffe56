"""Whether an adapter's tensors are those of the targets that its config names."""

import re
from collections.abc import Collection, Iterable, Mapping
from typing import Any

from torch import Tensor

from nemotron_v3.checkpoint.adapter_names import both_spellings
from nemotron_v3.checkpoint.names import LM_HEAD, is_stack

_LAYER = re.compile(r"(?:model|backbone)\.layers\.(\d+)(?=\.)")
_WHOLE = ("model.embeddings.weight", LM_HEAD)  # PEFT saves them beside adapters of its own accord


def target_problems(
    config: Mapping[str, Any],
    changed: Collection[tuple[str, int | None]],
    saved: Iterable[str],
    destinations: Mapping[str, Tensor],
    layers: Mapping[int, int],
) -> list[str]:
    """Where config and tensors contradict each other.

    Args:
        config: checked already.
        changed: the tensors in memory that have low-rank changes, with the expert.
        saved: the names of the whole tensors.
        destinations: the tensors in memory.
        layers: layers as the adapter counts them to those in memory.
    """
    old = {new: number for number, new in layers.items()}
    saved = list(saved)
    problems = _saved_problems(config, saved)
    biases = [name for name in destinations if _is_bias(name)]
    if config.get("bias") == "all" and biases and not any(map(_is_bias, saved)):
        problems.append(f"bias: 'all' of them were trained, and the file has none ({biases[0]})")
    targets = config.get("target_modules")
    if not targets and not config.get("target_parameters"):
        return problems  # PEFT's default for the model's type, which no file records
    modules = {name for name, _ in changed if not is_stack(name) and name.endswith(".weight")}
    for name, tensor in destinations.items():
        if not name.endswith(".weight") or tensor.dim() != 2 or is_stack(name):
            continue
        module = _LAYER.sub(
            lambda match: f"model.layers.{old.get(int(match[1]), match[1])}",
            name.removesuffix(".weight"),
        )
        wanted = _is_target(config, module)
        if name in modules and wanted is False and not _is_parameter(config, module):
            problems.append(f"target: {module} has an adapter, and target_modules leaves it out")
        if name not in modules and wanted and name not in _saved_wholes(config, module):
            problems.append(f"target: {module} is among target_modules and has no tensors")
    return problems


def _is_target(config: Mapping[str, Any], module: str) -> bool | None:
    """Whether the config names a module; None where it does not say so clearly."""
    names, targets = both_spellings(module), config.get("target_modules") or []
    if config.get("layers_pattern") or targets == "all-linear":
        return None
    if _matches(config.get("exclude_modules"), names):
        return False
    chosen = config.get("layers_to_transform")
    layer = _LAYER.match(module)
    if chosen is not None and layer and not isinstance(targets, str):
        chosen = chosen if isinstance(chosen, list) else [chosen]
        if int(layer[1]) not in chosen:
            return False
    return _matches(targets, names)


def _matches(targets: Any, names: tuple[str, ...]) -> bool:
    if isinstance(targets, str):
        return any(re.fullmatch(targets, name) for name in names)
    return any(name == t or name.endswith(f".{t}") for t in targets or () for name in names)


def _is_parameter(config: Mapping[str, Any], module: str) -> bool:
    return _matches(config.get("target_parameters"), both_spellings(f"{module}.weight"))


def _saved_wholes(config: Mapping[str, Any], module: str) -> tuple[str, ...]:
    named = _matches(config.get("modules_to_save"), both_spellings(module))
    return (f"{module}.weight",) if named else ()


def _saved_problems(config: Mapping[str, Any], saved: list[str]) -> list[str]:
    """Whole tensors that the config is silent about, and those it names that are not there."""
    listed = config.get("modules_to_save") or []
    problems = [
        f"whole: {name} is in the file, and neither modules_to_save nor bias speaks of it"
        for name in saved
        if name not in _WHOLE
        and not (_is_bias(name) and config.get("bias", "none") != "none")
        and not any(_holds(each, name) for each in listed)
    ]
    for each in listed:
        if not any(_holds(each, name) for name in saved):
            problems.append(f"whole: {each!r} of modules_to_save has no tensor in the file")
    return problems


def _is_bias(name: str) -> bool:
    return "bias" in name.rpartition(".")[2]


def _holds(module: str, name: str) -> bool:
    """Whether the tensor `name` belongs to a module that `module` is the end of."""
    return any(f".{module}." in f".{spelled}" for spelled in both_spellings(name))
