"""One call that spreads an unchanged model over processes, after all have said that they agree."""

import json

import torch
import torch.distributed as dist
from torch import nn
from torch.distributed.fsdp import FSDPModule, MixedPrecisionPolicy
from torch.distributed.tensor import DTensor

from nemotron_v3.layers.moe.dispatcher import LocalDispatcher
from nemotron_v3.layers.moe.moe import NemotronV3MoE
from nemotron_v3.layers.narrow import NarrowWeight
from nemotron_v3.model.model import NemotronV3ForCausalLM, NemotronV3Model
from nemotron_v3.parallel.agreement import agree, description, host_group
from nemotron_v3.parallel.costs import KEPT_BYTES
from nemotron_v3.parallel.ends import can_spread_embeddings, shard_tail, spread_embeddings
from nemotron_v3.parallel.experts import needs_fsdp, rows_dim, share_rows, spread_experts
from nemotron_v3.parallel.fsdp import gathered_bytes, shard_dense
from nemotron_v3.parallel.meshes import Meshes
from nemotron_v3.parallel.plan import Plan
from nemotron_v3.parallel.replicated import replicate_fp32
from nemotron_v3.parallel.shared_batches import share_batches
from nemotron_v3.parallel.token_counts import TokenCounts

Model = NemotronV3ForCausalLM | NemotronV3Model

GROUP_BYTES = 2**28  # half a millisecond on the way between two H200


def parallelize(
    model: Model,
    plan: Plan | None = None,
    *,
    mp_policy: MixedPrecisionPolicy | None = None,
    reshard_after_forward: bool | int | None = None,
    device_type: str | None = None,
    group_bytes: int = GROUP_BYTES,
) -> Model:
    """Spread a model over all processes, in place: experts by expert parallelism, the rest, and the
    rows of experts that several hold, by FSDP2.

    Every process calls it with the same model and plan, on the meta device or with weights, and
    with the adapters that there are to be. It gives the model tokens of its own, as many as it has.
    Gradients are sums over the processes, not means: divide the loss of each by the number of
    targets of all (`num_items_in_batch`), over all passes of a step. Make the optimiser afterwards.

    With `plan.cp` above 1 the processes of a group of as many call the model with the same whole
    batch and labels, and get their parts of its loss: their sum is the loss, and there are no
    logits. Layers called by themselves take `cp_size` and `cp_rank` of the group.

    Args:
        model: in the dtype that it is kept in.
        plan: by default experts are not spread, and all processes shard everything.
        mp_policy: as FSDP2 takes it; tensors that stay fp32 are gathered and summed as they are.
            None computes in the parameters' own dtypes. Experts that no others share are held and
            summed up in their own dtype.
        reshard_after_forward: see `torch.distributed.fsdp.fully_shard`. False keeps weights that
            were gathered until their backward pass: the host has least to do. None does so with
            dense weights of at most 8 GiB in all.
        device_type: of the meshes; by default that of the parameters, or of the device at hand
            where those are on the meta device.
        group_bytes: where dense weights are kept so, blocks that follow each other are gathered and
            their gradients summed together, as many as so many bytes hold, or one.

    Returns:
        The same model.

    Raises:
        RuntimeError: no process group, or a process that does not come.
        ValueError: a plan that does not divide processes, experts or rows; a module that is no
            model; one that is spread already or holds weights in 8 or 4 bits; and where processes
            differ, which. All raise it, and no model is changed.
    """
    if not dist.is_initialized():
        raise RuntimeError(
            "there is no process group to spread over: call torch.distributed.init_process_group "
            "first (torchrun starts the processes)"
        )
    plan, policy = plan or Plan(), mp_policy or MixedPrecisionPolicy()
    host = host_group()
    problem, said = None, {}
    try:
        plan = plan.over(dist.get_world_size())
        _check(model, plan)
        device_type = device_type or _device_type(model)
        said = _said(model, plan, policy, f"{reshard_after_forward}, {device_type}, {group_bytes}")
    except ValueError as error:
        problem = str(error)
    agree(problem, said, host)
    meshes = Meshes.of(plan, device_type or "cpu", host)
    backbone = model.model if isinstance(model, NemotronV3ForCausalLM) else model
    layers = _expert_layers(model)
    spread = plan.ep > 1
    if spread and layers:
        counts = TokenCounts(meshes.host_ep, backbone)
        for layer in layers:
            spread_experts(layer, meshes, counts)
    alone = {p for layer in layers for p in layer.experts.parameters()} if spread else set()
    alone |= replicate_fp32(backbone, meshes.of_dense())
    if can_spread_embeddings(model, meshes, policy):
        alone |= spread_embeddings(backbone, meshes)
    if isinstance(model, NemotronV3ForCausalLM):
        alone |= shard_tail(model, meshes.of_dense(), policy)
    reshard = reshard_after_forward
    if reshard is None and gathered_bytes(set(model.parameters()) - alone, policy) <= KEPT_BYTES:
        reshard = False
    shard_dense(model, meshes.of_dense(), policy, reshard, alone, group_bytes)
    for layer in layers if spread else ():
        if needs_fsdp(layer.experts, meshes, policy):
            share_rows(layer.experts, meshes, policy, reshard_after_forward)
    for module in model.modules():
        if isinstance(module, FSDPModule):
            # Both: a factor alone is multiplied in by the library that sums, which gloo refuses and
            # NCCL gets wrong in bfloat16.
            module.set_force_sum_reduction_for_comms(True)
            module.set_gradient_divide_factor(1.0)
    if isinstance(model, NemotronV3ForCausalLM) and plan.cp > 1:
        share_batches(model, meshes)
    return model


def _expert_layers(model: nn.Module) -> list[NemotronV3MoE]:
    return [module for module in model.modules() if isinstance(module, NemotronV3MoE)]


def _device_type(model: nn.Module) -> str:
    found = {p.device.type for p in model.parameters()} - {"meta"}
    if len(found) > 1:
        raise ValueError(f"the model lies on several kinds of device: {sorted(found)}")
    return found.pop() if found else ("cuda" if torch.cuda.is_available() else "cpu")


def _check(model: nn.Module, plan: Plan) -> None:
    """Raises ValueError for what cannot be spread so."""
    if not isinstance(model, Model):
        raise ValueError(
            f"parallelize takes a NemotronV3ForCausalLM or NemotronV3Model, got a "
            f"{type(model).__name__}: use torch.distributed.fsdp.fully_shard for other modules"
        )
    for name, parameter in model.named_parameters():
        if isinstance(parameter, DTensor):
            raise ValueError(f"{name} is spread over processes already: parallelize a model once")
        if isinstance(parameter, NarrowWeight):
            raise ValueError(
                f"{name} is held in 8 or 4 bits, which cannot be spread: load the model wide"
            )
    if plan.cp > 1 and not isinstance(model, NemotronV3ForCausalLM):
        raise ValueError(
            f"cp = {plan.cp} shares the tokens of a loss, which a {type(model).__name__} has not: "
            "give a NemotronV3ForCausalLM"
        )
    for layer in _expert_layers(model) if plan.ep > 1 else ():
        _check_experts(layer, plan)


def _check_experts(layer: NemotronV3MoE, plan: Plan) -> None:
    experts = len(layer.gate.weight)
    if experts % plan.ep:
        raise ValueError(
            f"ep = {plan.ep} does not divide the {experts} experts of a layer: each process holds "
            "as many whole ones"
        )
    if type(layer.dispatcher) is not LocalDispatcher:
        raise ValueError(
            f"a layer of experts has a {type(layer.dispatcher).__name__} as its dispatcher: "
            "parallelize puts its own there"
        )
    low_rank = layer.experts.low_rank
    if low_rank is not None and low_rank.merged:
        raise ValueError("a layer's low-rank updates are merged: unmerge_low_rank() first")
    sharers = plan.set_size // plan.ep
    for name, parameter in layer.experts.named_parameters():
        if rows_dim(tuple(parameter.shape), sharers) is None:
            raise ValueError(
                f"{name} {tuple(parameter.shape)} of a layer's experts has no dimension that "
                f"dp_shard * cp / ep = {sharers} processes can share evenly: choose another plan"
            )


def _said(model: Model, plan: Plan, policy: MixedPrecisionPolicy, rest: str) -> dict[str, str]:
    """What has to be the same on all processes."""
    config = json.dumps(model.config.to_dict(), sort_keys=True, default=str)
    options = {"the plan": f"{plan}", "the precision": f"{policy}", "the options": rest}
    about = {"torch": torch.__version__, "the kind of model": type(model).__name__}
    return {**about, **options, "the config": config, **description(model)}
