"""Small tensors that every process holds whole: those of mixers that stay fp32.

They are a few hundred numbers a mixer. A group of FSDP2 for each mixer's would cost the host as
much as one of a block's matrices. Here a pass reads them where they are, and their gradients, of
all mixers together, are summed up once.

Letters: R processes, n numbers of all these tensors.
"""

from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.autograd.function import once_differentiable
from torch.distributed import ProcessGroup
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.tensor import DTensor, Replicate

from nemotron_v3.layers.fp32_params import KeepsFp32
from nemotron_v3.parallel.agreement import joined
from nemotron_v3.parallel.collectives import gathered


def kept_fp32(module: KeepsFp32) -> dict[str, nn.Parameter]:
    """The parameters among a module's fp32 tensors; buffers are on every process already."""
    own = dict(module.named_parameters(recurse=False))
    return {name: own[name] for name in module.fp32_tensors if name in own}


def replicate_fp32(backbone: nn.Module, mesh: DeviceMesh) -> set[nn.Parameter]:
    """Keep the fp32 tensors of all mixers whole on each process; gives their parameters.

    They become `DTensor`s of a mesh of all processes, as what is sharded does: an optimiser, a
    state dict and a checkpoint take them alike.
    """
    owners = [m for m in backbone.modules() if isinstance(m, KeepsFp32) and kept_fp32(m)]
    placements = [Replicate()] * mesh.ndim
    for owner in owners:
        for name, parameter in kept_fp32(owner).items():
            # Values agree already; a later `init_weights` sends the first process's round.
            own = parameter.detach().clone()
            whole = DTensor.from_local(own, mesh, placements, run_check=False)
            setattr(owner, name, nn.Parameter(whole, requires_grad=parameter.requires_grad))
    if owners:
        views = _Views(owners, backbone)
        for owner in owners:
            owner.local = views.of
    return {p for owner in owners for p in kept_fp32(owner).values()}


class _Views:
    """What a pass computes with: the same numbers, whose gradients are sums over the processes.

    They are made when a pass first asks. A recomputation finds those of the pass that it repeats,
    or of a later one: they are of one memory.
    """

    def __init__(self, owners: list[KeepsFp32], backbone: nn.Module):
        self._owners = owners
        self._made: dict[int, Tensor] = {}
        backbone.register_forward_pre_hook(self._begin)

    def of(self, tensor: Tensor) -> Tensor:
        if not isinstance(tensor, DTensor):
            return tensor
        if not (tensor.requires_grad and torch.is_grad_enabled()):
            return tensor.to_local()
        if id(tensor) not in self._made:
            self._make()
        return self._made[id(tensor)]

    def _make(self) -> None:
        every = [p for owner in self._owners for p in kept_fp32(owner).values() if p.requires_grad]
        # All processes, in a group apart from that of FSDP2, behind whose sums it would wait.
        views = _Summed.apply(joined(dist.group.WORLD), *every)
        self._made = {id(p): view for p, view in zip(every, views, strict=True)}

    def _begin(self, *_: Any) -> None:
        self._made = {}


class _Summed(torch.autograd.Function):
    """The local tensors; their gradients are summed over all processes, in the order of the ranks,
    by one collective."""

    @staticmethod
    def forward(ctx: Any, group: ProcessGroup, *tensors: DTensor) -> tuple[Tensor, ...]:
        ctx.group = group
        ctx.meshes = [(t.device_mesh, t.placements) for t in tensors]
        return tuple(t.to_local().view_as(t.to_local()) for t in tensors)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor | None, ...]:
        mine = torch.cat([gradient.flatten() for gradient in gradients])  # [n]
        total = gathered(mine[None], ctx.group).sum(0)  # [R, n] -> [n]
        parts = total.split([gradient.numel() for gradient in gradients])
        return None, *(
            DTensor.from_local(part.view_as(gradient), mesh, placements, run_check=False)
            for part, gradient, (mesh, placements) in zip(parts, gradients, ctx.meshes, strict=True)
        )
