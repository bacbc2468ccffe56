"""One update of AdamW as one pass over a parameter, its gradient and its moments.

PyTorch's fused AdamW updates fp32 weights. Weights in bfloat16 would be widened before it, their
gradients too, and rounded after it: six passes over memory, and a wait for each parameter's key.
Here a compiler makes one kernel of all of it.
"""

import functools
import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.autograd.graph import increment_version

from nemotron_v3.train.rounding import rounded, what_rounds

CHUNK = 2**30  # elements of a kernel, whose numbers have 32 bits


@dataclass(frozen=True)
class Update:
    """What one parameter's update needs.

    Attributes:
        weight: what this process holds of it.
        gradient, exp_avg, exp_avg_sq: of its shape; the moments fp32.
        master: the weight in fp32, of which `weight` is a rounded copy; or None.
        numbers: of `update_numbers`.
        key: of `rounding_key`, where the weight is rounded at random; or None.
        first: the number, in the whole parameter, of the weight's first element.
    """

    weight: Tensor
    gradient: Tensor
    exp_avg: Tensor
    exp_avg_sq: Tensor
    master: Tensor | None
    numbers: tuple[float, ...]
    key: int | None
    first: int


def update_numbers(group: dict[str, Any], count: int, scale: float) -> tuple[float, ...]:
    """What AdamW (Loshchilov and Hutter 2019, arXiv 1711.05101) multiplies by in the update
    `count`, from 1, of a parameter whose gradient is shortened by `scale`."""
    beta1, beta2 = group["betas"]
    return (
        scale,
        1 - beta1,
        beta2,
        1 - beta2,
        1 / math.sqrt(1 - beta2**count),
        group["eps"],
        1 - group["lr"] * group["weight_decay"],
        group["lr"] / (1 - beta1**count),
    )


@torch.no_grad()
def update_(updates: Sequence[Update]) -> None:
    """Make the updates, all of them on one device, for which nothing waits."""
    device = updates[0].weight.device
    chunks = [(u, start) for u in updates for start in range(0, u.weight.numel(), CHUNK)]
    numbers = _sent([u.numbers for u, _ in chunks], torch.float32, device)
    keys = _sent([what_rounds(u.key or 0, u.first + s) for u, s in chunks], torch.int64, device)
    on_gpu = device.type == "cuda"
    for (u, start), of_update, told in zip(chunks, numbers.unbind(), keys.unbind(), strict=True):
        run = _pass(u.key is not None, on_gpu)
        tensors = (u.weight, u.gradient.contiguous(), u.exp_avg, u.exp_avg_sq, u.master)
        parts = [None if t is None else _flat(t, start) for t in tensors]
        run(*parts, _flat(of_update), _flat(told))
    # What is no view of a weight does not tell autograd, and who keeps something of it, by itself.
    increment_version([u.weight for u in updates])


def _flat(tensor: Tensor, start: int = 0) -> Tensor:
    """Elements of a contiguous tensor from a place on, as many as a kernel takes, which are no view
    of it: a compiler would make a kernel for each shape that views are of."""
    assert tensor.is_contiguous()
    count = min(CHUNK, tensor.numel() - start)
    first = tensor.storage_offset() + start
    return tensor.new_empty(0).set_(tensor.untyped_storage(), first, (count,), (1,))


def _sent(rows: list[Any], dtype: torch.dtype, device: torch.device) -> Tensor:
    """On the device, without a wait for it."""
    told = torch.tensor(rows, dtype=dtype)
    if device.type != "cuda":
        return told.to(device)
    return told.pin_memory().to(device, non_blocking=True)


def _updated_at_random(
    weight: Tensor,
    gradient: Tensor,
    exp_avg: Tensor,
    exp_avg_sq: Tensor,
    master: Tensor | None,
    numbers: Tensor,
    told: Tensor,
) -> None:
    new = _moved(weight if master is None else master, gradient, exp_avg, exp_avg_sq, numbers)
    weight.copy_(rounded(new, told))


def _updated(
    weight: Tensor,
    gradient: Tensor,
    exp_avg: Tensor,
    exp_avg_sq: Tensor,
    master: Tensor | None,
    numbers: Tensor,
    told: Tensor,
) -> None:
    new = _moved(weight if master is None else master, gradient, exp_avg, exp_avg_sq, numbers)
    if master is not None:
        master.copy_(new)
    weight.copy_(new)


def _moved(
    weight: Tensor, gradient: Tensor, exp_avg: Tensor, exp_avg_sq: Tensor, numbers: Tensor
) -> Tensor:
    """The new weight in fp32; the moments are changed in place."""
    scale, new1, beta2, new2, root, eps, kept, rate = numbers.unbind()
    g = gradient.float() * scale
    m = exp_avg + new1 * (g - exp_avg)
    v = beta2 * exp_avg_sq + new2 * (g * g)
    exp_avg.copy_(m)
    exp_avg_sq.copy_(v)
    return weight.float() * kept - rate * (m / (v.sqrt() * root + eps))


@functools.cache
def _pass(at_random: bool, compiled: bool) -> Callable[..., None]:
    run = _updated_at_random if at_random else _updated
    return torch.compile(run, dynamic=True) if compiled else run
