"""The norm of a gradient whose tensors lie on several meshes, and its shortening."""

from collections.abc import Iterable

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed import ProcessGroup
from torch.distributed.tensor import DTensor, Partial, Replicate


def gradient_norm(parameters: Iterable[nn.Parameter]) -> Tensor:
    """The 2-norm of all gradients together, the same on all processes: see `total_norm`."""
    return total_norm(p.grad for p in parameters if p.grad is not None)


@torch.no_grad()
def total_norm(gradients: Iterable[Tensor]) -> Tensor:
    """The 2-norm of tensors together, of several meshes perhaps; fp32 or wider.

    Plain tensors are taken to be the same everywhere. Every process of the meshes calls it.

    Raises:
        ValueError: a gradient whose sum over processes was not made.
    """
    held: dict[tuple[tuple[ProcessGroup, ...], torch.dtype], list[Tensor]] = {}
    for gradient in gradients:
        dtype = torch.promote_types(gradient.dtype, torch.float32)
        held.setdefault((_sharers(gradient), dtype), []).append(_local(gradient))
    total: Tensor | None = None
    for (groups, dtype), tensors in held.items():
        norms = torch._foreach_norm(tensors, 2.0, dtype=dtype)  # pyright: ignore[reportPrivateImportUsage]
        square = torch.stack(norms).square().sum()
        for group in groups:
            dist.all_reduce(square, group=group)
        total = square if total is None else total + square
    return torch.zeros(()) if total is None else total.sqrt()


@torch.no_grad()
def clip_gradients_(parameters: Iterable[nn.Parameter], longest: float, norm: Tensor) -> None:
    """Multiply all gradients by `longest / norm` where their norm is more than `longest`.

    As `torch.nn.utils.clip_grads_with_norm_`, on tensors of several meshes.
    """
    factor = (longest / (norm + 1e-6)).clamp(max=1.0)
    for gradient in (p.grad for p in parameters if p.grad is not None):
        local = _local(gradient)
        local.mul_(factor.to(local.device))


def _sharers(gradient: Tensor) -> tuple[ProcessGroup, ...]:
    """The groups among which its parts lie: one for each dimension of its mesh that cuts it."""
    if not isinstance(gradient, DTensor):
        return ()
    if any(isinstance(placement, Partial) for placement in gradient.placements):
        raise ValueError(f"a gradient {tuple(gradient.shape)} is not summed over processes yet")
    mesh = gradient.device_mesh
    return tuple(
        mesh.get_group(dim)
        for dim, placement in enumerate(gradient.placements)
        if not isinstance(placement, Replicate) and mesh.size(dim) > 1
    )


def _local(gradient: Tensor) -> Tensor:
    return gradient.to_local() if isinstance(gradient, DTensor) else gradient
