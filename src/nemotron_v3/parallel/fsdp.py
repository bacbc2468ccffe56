"""FSDP2 for a model whose tensors do not all have one dtype.

PyTorch's `fully_shard` makes one group of a module's parameters: they are gathered together, in one
dtype. A Mamba-2 mixer holds `A_log`, `D` and `dt_bias` in fp32 among bf16 projections, and a mixed
precision policy would cast them with the rest. So `shard_model` gives them a group of their own;
`parallelize` leaves them whole (`replicated.py`).
"""

from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from typing import Any

import torch.distributed as dist
from torch import nn
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.fsdp import FSDPModule, MixedPrecisionPolicy, fully_shard

from nemotron_v3.layers.fp32_params import KeepsFp32
from nemotron_v3.model.model import NemotronV3ForCausalLM, NemotronV3Model
from nemotron_v3.parallel.replicated import kept_fp32


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
    group_bytes: int = 0,
) -> None:
    """`shard_model` of all parameters but those that are to be left `alone`.

    Args:
        group_bytes: blocks that follow each other are one group up to so many bytes of gathered
            weights, where those stay after the forward pass.
    """
    options: dict[str, Any] = {"mesh": mesh, "reshard_after_forward": reshard_after_forward}
    as_they_are = MixedPrecisionPolicy(cast_forward_inputs=False)
    backbone = model.model if isinstance(model, NemotronV3ForCausalLM) else model
    owners = [m for m in backbone.modules() if isinstance(m, KeepsFp32)]
    kept = {owner: set(kept_fp32(owner).values()) - alone for owner in owners}
    apart = alone.union(*kept.values())
    blocks = list(backbone.layers)
    together = group_bytes if reshard_after_forward is False else 0
    groups = list(_groups(blocks, policy, apart, together))
    for first, *others in groups:
        with _within(first, others):
            fully_shard(first, mp_policy=policy, ignored_params=apart, **options)
    for owner, own in kept.items():
        if own:
            # Behind the blocks, which leave out what is in a group already.
            others = set(owner.parameters()) - own
            fully_shard(owner, mp_policy=as_they_are, ignored_params=others, **options)
    if reshard_after_forward is False:
        # Begun before the group at hand is computed, also where the host is not ahead.
        leaders = [first for first, *_ in groups if isinstance(first, FSDPModule)]
        for leader, following in zip(leaders, leaders[1:], strict=False):
            leader.set_modules_to_forward_prefetch([following])
    done = {p for block in blocks for p in block.parameters()}
    fully_shard(model, mp_policy=policy, ignored_params=alone | done, **options)


def gathered_bytes(parameters: Iterable[nn.Parameter], policy: MixedPrecisionPolicy) -> int:
    """Of whole tensors in the dtype that they are computed in."""
    return sum(p.numel() * (policy.param_dtype or p.dtype).itemsize for p in parameters)


def _groups(
    blocks: list[nn.Module], policy: MixedPrecisionPolicy, apart: set[nn.Parameter], most: int
) -> Iterator[list[nn.Module]]:
    """Blocks that follow each other, as many as `most` bytes of their weights hold, or one."""
    group: list[nn.Module] = []
    held = 0
    for block in blocks:
        own = set(block.parameters()) - apart
        size = gathered_bytes(own, policy)
        if group and held + size > most:
            yield group
            group, held = [], 0
        group.append(block)
        held += size
    if group:
        yield group


@contextmanager
def _within(first: nn.Module, others: list[nn.Module]) -> Iterator[None]:
    """Let `fully_shard` of the first of several blocks find the parameters of all.

    Its calls alone are seen: they gather the weights of all before them, and sum the gradients of
    all behind the backward pass of the first, which is the last one's. In a list of modules as
    `fully_shard` takes it every one is seen, and has to be called as often as the others: of
    recomputed blocks only some are.
    """
    first.add_module("_others", nn.ModuleList(others))
    try:
        yield
    finally:
        del first._modules["_others"]
