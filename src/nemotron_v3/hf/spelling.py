"""State dicts with the names of checkpoint files, renamed for a model in memory."""

from collections import defaultdict
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from nemotron_v3.checkpoint.names import Place, to_memory


def as_in_memory(
    state: Mapping[str, Any], own: Mapping[str, Tensor], strict: bool
) -> Mapping[str, Any]:
    """Rename the tensors of a state dict to the names of the model in memory.

    Args:
        state: under the names of memory or of files (`backbone.`, one tensor an expert).
        own: the model's state dict.
        strict: if True, omit a stack with missing experts, so that loading reports it. If False,
            take the missing experts from the model, as when loading one shard.

    Returns:
        The tensors of the model under its names, and all others under the names that they had.
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
