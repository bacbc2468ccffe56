"""Which module made the first NaN of a step."""

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from functools import partial
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.utils import _pytree as pytree

from nemotron_v3.train.batches import Batch
from nemotron_v3.train.processes import World


def first_not_finite(
    model: nn.Module,
    called: nn.Module,
    batches: Sequence[Batch],
    items: float,
    seed: int,
    world: World,
) -> str:
    """Run a step's passes again, and say where the first value that is not finite comes from.

    Every process has to call it; gradients are dropped.

    Args:
        seed: of what the step draws, such as dropout.
    """
    torch.manual_seed(seed)
    found: list[str] = []
    with _watched(model, found):
        for batch in batches:
            loss = called(**batch.arguments(), num_items_in_batch=items).loss
            if not found and not loss.isfinite():
                found.append("the loss, of hidden states that are finite")
            loss.backward()
    if not found:
        found += [
            f"the gradient of {name}"
            for name, parameter in model.named_parameters()
            if parameter.grad is not None and not _all_finite(parameter.grad)
        ]
    model.zero_grad(set_to_none=True)
    mine = found[0] if found else ""
    if world.size > 1:
        everyone: list[Any] = [None] * world.size
        dist.all_gather_object(everyone, mine)
        told = [f"rank {rank}: {what}" for rank, what in enumerate(everyone) if what]
        return "; ".join(told) or "nothing when it was computed again"
    return mine or "nothing when it was computed again"


@contextmanager
def _watched(model: nn.Module, found: list[str]) -> Iterator[None]:
    """Within it, the first output or gradient of an output that is not finite is noted."""
    handles = []
    for name, module in model.named_modules():
        handles.append(module.register_forward_hook(partial(_see, name or "the model", found)))
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()


def _see(name: str, found: list[str], module: nn.Module, args: Any, output: Any) -> None:
    tensors = [t for t in pytree.tree_leaves(output) if isinstance(t, Tensor)]
    for tensor in tensors:
        if not tensor.is_floating_point():
            continue
        if not found and not _all_finite(tensor):
            found.append(f"the output of {name}")
        if tensor.requires_grad:
            tensor.register_hook(partial(_see_gradient, name, found))


def _see_gradient(name: str, found: list[str], gradient: Tensor) -> None:
    if not found and not _all_finite(gradient):
        found.append(f"the gradient that reaches the output of {name}")


def _all_finite(tensor: Tensor) -> bool:
    return bool(torch.isfinite(tensor).all())
