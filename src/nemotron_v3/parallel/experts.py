"""Spreads a layer's experts over processes: whole ones on each, parts of one tensor."""

from torch import Tensor, nn
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.fsdp import MixedPrecisionPolicy, fully_shard
from torch.distributed.tensor import DTensor, Shard

from nemotron_v3.layers.moe.dispatcher import ExpertDispatcher
from nemotron_v3.layers.moe.moe import NemotronV3MoE
from nemotron_v3.parallel.all_to_all_dispatcher import AllToAllDispatcher
from nemotron_v3.parallel.gather_dispatcher import GatherDispatcher, Owned
from nemotron_v3.parallel.meshes import Meshes
from nemotron_v3.parallel.token_counts import TokenCounts


def spread_experts(layer: NemotronV3MoE, meshes: Meshes, counts: TokenCounts) -> None:
    """Leave each process of `ep` its own experts, and have their tokens brought to them.

    Stacks and low-rank updates become `DTensor`s of their whole shapes, of which a process holds
    the experts that are its own; an optimiser, a state dict and a checkpoint see whole stacks.
    """
    experts, mesh = layer.experts, meshes.ep
    for module in experts.modules():
        for name, parameter in list(module.named_parameters(recurse=False)):
            setattr(module, name, first_rows(parameter, mesh))
    experts.local = _held_here
    layer.gate.replays = True
    all_experts, each = len(layer.gate.weight), len(layer.gate.weight) // mesh.size()
    first = mesh.get_local_rank() * each
    layer.dispatcher = _dispatcher(layer, meshes, Owned(first, first + each, all_experts), counts)


def _dispatcher(
    layer: NemotronV3MoE, meshes: Meshes, owned: Owned, counts: TokenCounts
) -> ExpertDispatcher:
    group = meshes.ep.get_group()
    if meshes.plan.gathers(owned.all, layer.gate.top_k):
        return GatherDispatcher(group, owned, counts)
    return AllToAllDispatcher(group, owned.end - owned.first)


def first_rows(parameter: Tensor, mesh: DeviceMesh) -> nn.Parameter:
    """A parameter of which each process of a mesh keeps as many of the first dimension."""
    each = parameter.shape[0] // mesh.size()
    own = parameter.detach().narrow(0, mesh.get_local_rank() * each, each).clone()
    whole = DTensor.from_local(
        own, mesh, [Shard(0)], run_check=False, shape=parameter.shape, stride=parameter.stride()
    )
    return nn.Parameter(whole, requires_grad=parameter.requires_grad)


def _held_here(tensor: Tensor) -> Tensor:
    return tensor.to_local() if isinstance(tensor, DTensor) else tensor


def needs_fsdp(experts: nn.Module, meshes: Meshes, policy: MixedPrecisionPolicy) -> bool:
    """Whether others share the rows of these experts, or they are computed in another dtype."""
    sharers = meshes.of_experts().size()
    casts = {p.dtype for p in experts.parameters()} - {policy.param_dtype}
    return sharers > 1 or (policy.param_dtype is not None and bool(casts))


def rows_dim(shape: tuple[int, ...], sharers: int) -> int | None:
    """The first dimension behind that of the experts which so many can share evenly."""
    return next((dim for dim in range(1, len(shape)) if shape[dim] % sharers == 0), None)


def share_rows(
    experts: nn.Module,
    meshes: Meshes,
    policy: MixedPrecisionPolicy,
    reshard_after_forward: bool | int | None,
) -> None:
    """Share the rows of each of a process's experts with those that hold the same ones."""
    mesh = meshes.of_experts()
    sharers = mesh.size(mesh.ndim - 1)

    def placement(parameter: nn.Parameter) -> Shard:
        return Shard(rows_dim(tuple(parameter.shape), sharers) or 1)

    fully_shard(
        experts,
        mesh=mesh,
        mp_policy=policy,
        shard_placement_fn=placement,
        reshard_after_forward=reshard_after_forward,
    )
