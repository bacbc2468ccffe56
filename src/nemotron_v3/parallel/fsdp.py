"""FSDP2 for a model whose tensors do not all have one dtype.

PyTorch's `fully_shard` makes one group of a module's parameters: they are gathered together, in one
dtype. A Mamba-2 mixer holds `A_log`, `D` and `dt_bias` in fp32 among bf16 projections, and a mixed
precision policy would cast them with the rest. So they get a group of their own.
"""

import torch.distributed as dist
from torch import nn
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.fsdp import MixedPrecisionPolicy, fully_shard

from nemotron_v3.layers.fp32_params import KeepsFp32
from nemotron_v3.model.model import NemotronV3ForCausalLM, NemotronV3Model


def shard_model(
    model: NemotronV3ForCausalLM | NemotronV3Model,
    mesh: DeviceMesh | None = None,
    *,
    mp_policy: MixedPrecisionPolicy | None = None,
    reshard_after_forward: bool | int | None = None,
) -> nn.Module:
    """Shard the parameters over the processes of a mesh, in place: one group a block, one for the
    rest, and one a mixer for the tensors that stay fp32.

    Make the optimiser afterwards: the parameters become `DTensor`s. DDP needs none of this: it
    takes the model as it is.

    Args:
        model: in the dtype it is kept in.
        mesh: of one dimension, or of two for hybrid sharding; by default all processes.
        mp_policy: for all groups but those of the fp32 tensors, which are gathered and reduced in
            the dtype they have; None computes in the parameters' own dtypes.
        reshard_after_forward: see `torch.distributed.fsdp.fully_shard`.

    Returns:
        The same model.

    Raises:
        TypeError: another kind of module.
        RuntimeError: no process group.
    """
    if not isinstance(model, NemotronV3ForCausalLM | NemotronV3Model):
        raise TypeError(
            f"shard_model takes a NemotronV3ForCausalLM or NemotronV3Model, got a "
            f"{type(model).__name__}: use torch.distributed.fsdp.fully_shard for other modules"
        )
    if not dist.is_initialized():
        raise RuntimeError(
            "there is no process group to shard over: call torch.distributed.init_process_group "
            "first (torchrun starts the processes)"
        )
    policy = mp_policy or MixedPrecisionPolicy()
    shard_dense(model, mesh, policy, reshard_after_forward, set())
    return model


def shard_dense(
    model: NemotronV3ForCausalLM | NemotronV3Model,
    mesh: DeviceMesh | None,
    policy: MixedPrecisionPolicy,
    reshard_after_forward: bool | int | None,
    alone: set[nn.Parameter],
) -> None:
    """`shard_model` of all parameters but those that are to be left `alone`."""
    options = {"mesh": mesh, "reshard_after_forward": reshard_after_forward}
    as_they_are = MixedPrecisionPolicy(cast_forward_inputs=False)
    backbone = model.model if isinstance(model, NemotronV3ForCausalLM) else model
    for block in backbone.layers:
        owners = {m: _kept(m) for m in block.modules() if isinstance(m, KeepsFp32)}
        kept = set().union(*owners.values())
        fully_shard(block, mp_policy=policy, ignored_params=kept | alone, **options)
        for owner, own in owners.items():
            if own:
                others = set(owner.parameters()) - own
                fully_shard(owner, mp_policy=as_they_are, ignored_params=others, **options)
    fully_shard(model, mp_policy=policy, ignored_params=alone, **options)


def _kept(module: KeepsFp32) -> set[nn.Parameter]:
    """The parameters among its fp32 tensors; buffers are not sharded."""
    own = dict(module.named_parameters(recurse=False))
    return {own[name] for name in module.fp32_tensors if name in own}
