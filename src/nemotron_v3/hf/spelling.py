"""State dicts in the spelling of files, as a model in memory takes them."""

from collections import defaultdict
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from nemotron_v3.checkpoint.names import Place, to_memory


def as_in_memory(
    state: Mapping[str, Any], own: Mapping[str, Tensor], strict: bool
) -> Mapping[str, Any]:
    """A state dict under the model's own names, whichever it came in.

    Args:
        state: under the names of memory or of files (`backbone.`, one tensor an expert).
        own: the model's state dict.
        strict: leave a stack out of which an expert is missing; else the model's own takes its
            place, as it does for a shard of a checkpoint that holds some.

    Returns:
        What belongs to the model under its names; what does not, under the name it came with.
    """
    if state.keys() <= own.keys():
        return state
    renamed: dict[str, Any] = {}
    stacks: dict[str, dict[int, Tensor]] = defaultdict(dict)
    for name, tensor in state.items():
        place, memory = (None, name) if name in own else _place(name, own)
        if place is None or memory not in own:
            renamed[name] = tensor
        elif place.expert is None:
            renamed[memory] = tensor
        elif place.expert < own[memory].shape[0]:
            stacks[memory][place.expert] = tensor
        else:
            renamed[name] = tensor
    for name, experts in stacks.items():
        stack = own[name]
        if len(experts) == stack.shape[0]:
            renamed[name] = torch.stack([experts[i] for i in range(len(experts))])
        elif not strict:
            mended = stack.detach().clone()
            for expert, tensor in experts.items():
                mended[expert] = tensor.to(mended)
            renamed[name] = mended
    return renamed


def _place(name: str, own: Mapping[str, Tensor]) -> tuple[Place | None, str]:
    """The place of a name of files, and what the model calls it: a backbone by itself has no
    `model.` in front, in memory and in its own files."""
    place = to_memory(name)
    if place is not None and place.memory in own:
        return place, place.memory
    place = place or to_memory("backbone." + name)
    return place, "" if place is None else place.memory.removeprefix("model.")
