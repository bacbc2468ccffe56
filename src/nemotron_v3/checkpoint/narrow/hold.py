"""Weights that stay quantised in a model: which can, and the tensors that hold them."""

import math
from collections.abc import Mapping

import torch
from torch import Tensor

from nemotron_v3.checkpoint.narrow.layouts import NVFP4, StoredNarrow
from nemotron_v3.checkpoint.narrow.read import Stored, parts_of
from nemotron_v3.checkpoint.plan import Fill
from nemotron_v3.layers.narrow import NarrowParts, NarrowWeight


def held_narrow(
    fills: list[Fill], weights: Mapping[str, StoredNarrow], shapes: Mapping[str, torch.Size]
) -> dict[str, StoredNarrow]:
    """The tensors of a model that can stay quantised, each with one of the weights that fill it.

    A stack can stay quantised if all experts have the same layout and scale shape.
    """
    kinds: dict[str, set] = {}
    for fill in fills:
        weight = weights.get(fill.disk)
        kind = None if weight is None else (weight.layout, weight.tiles, weight.divides)
        kinds.setdefault(fill.memory, set()).add(kind)
    one = {fill.memory: weights[fill.disk] for fill in fills if fill.disk in weights}
    return {
        name: one[name]
        for name, found in kinds.items()
        if found != {None} and len(found) == 1 and name in shapes
    }


def empty_like(
    weight: StoredNarrow,
    stored: Stored,
    shape: torch.Size,
    dtype: torch.dtype,
    device: torch.device,
) -> NarrowWeight:
    """A weight of `shape`, or a stack of them, to be filled; `dtype` is that of its values."""
    experts, (N, K) = shape[:-2], shape[-2:]
    packed = weight.layout == NVFP4
    codes = torch.empty(
        *experts, N, K // 2 if packed else K,
        dtype=torch.uint8 if packed else torch.float8_e4m3fn, device=device,
    )  # fmt: skip
    scales = stored.tensor(weight.scale)
    scale = torch.empty(*experts, *weight.tiles, dtype=scales.dtype, device=device)
    number = None
    if weight.global_scale is not None:
        number = torch.empty(tuple(experts), dtype=torch.float32, device=device)
    return NarrowWeight(NarrowParts(codes, scale, number), weight.divides, dtype)


def fill_narrow(
    target: NarrowWeight, stored: Stored, weight: StoredNarrow, expert: int | None
) -> None:
    """Copy the tensors of a stored weight, as they are, into `target` or one expert of it."""
    for ours, theirs in zip(target.parts, parts_of(stored, weight), strict=True):
        if ours is not None and theirs is not None:
            (ours if expert is None else ours[expert]).copy_(theirs)


def holds(tensor: Tensor, stored: Stored, weight: StoredNarrow) -> bool:
    """Whether a narrow tensor of a model is the stored weight, bit for bit."""
    assert isinstance(tensor, NarrowWeight)
    pairs = zip(tensor.parts, parts_of(stored, weight), strict=True)
    equal = tensor.divides == weight.divides and all(
        ours is theirs is None or (ours is not None and theirs is not None and _same(ours, theirs))
        for ours, theirs in pairs
    )
    for part in weight.parts:
        stored.drop(part)
    return equal


def _same(ours: Tensor, theirs: Tensor) -> bool:
    if ours.dtype != theirs.dtype or ours.shape != theirs.shape:
        return False
    flat = (part.detach().cpu().contiguous().reshape(-1) for part in (ours, theirs))
    return math.prod(ours.shape) == 0 or torch.equal(*(part.view(torch.uint8) for part in flat))
