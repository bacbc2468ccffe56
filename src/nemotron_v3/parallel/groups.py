"""Groups of parameters for optimisers that take tensors of one mesh at a time."""

from collections.abc import Hashable, Iterable
from typing import Any

from torch import nn
from torch.distributed.tensor import DTensor


def by_mesh(groups: Iterable[dict[str, Any]]) -> list[dict[str, Any]]:
    """The groups of an optimiser, each cut into those whose parameters lie on one mesh in one way.

    PyTorch's fused and multi-tensor updates refuse a list that has plain tensors beside `DTensor`s,
    or `DTensor`s of several meshes. A group's other settings go with each of its parts.
    """
    return [{**group, "params": members} for group in groups for members in _apart(group["params"])]


def _apart(parameters: Iterable[nn.Parameter]) -> list[list[nn.Parameter]]:
    parts: dict[Hashable, list[nn.Parameter]] = {}
    for parameter in parameters:
        spread = isinstance(parameter, DTensor)
        where = (parameter.device_mesh, parameter.placements) if spread else None
        parts.setdefault(where, []).append(parameter)
    return list(parts.values())
