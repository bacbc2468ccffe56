"""The two ends of a model, whose matrices are its largest dense ones: embeddings, and the head.

Letters: R processes that share them, V vocabulary, T token ids of this process, n the most ids of
any of them, D hidden size.
"""

import warnings
from functools import partial

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.distributed import ProcessGroup
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.fsdp import MixedPrecisionPolicy, fully_shard
from torch.distributed.tensor import DTensor

from nemotron_v3.model.model import NemotronV3ForCausalLM, NemotronV3Model
from nemotron_v3.parallel.collectives import gathered, sums_of
from nemotron_v3.parallel.experts import first_rows
from nemotron_v3.parallel.meshes import Meshes
from nemotron_v3.parallel.token_counts import TokenCounts


def shard_tail(
    model: NemotronV3ForCausalLM, mesh: DeviceMesh | None, policy: MixedPrecisionPolicy
) -> set[nn.Parameter]:
    """Make one group of the final norm and a head of its own; gives its parameters.

    The head's matrix is read by the loss, without a call that FSDP2 would see. In one group with
    the norm, whose call comes just before, it is gathered while the blocks compute, and its
    gradient is summed up behind theirs. In the model's own group it would be gathered before all,
    and its gradient summed up after all.
    """
    norm, head = model.model.norm_f, model.lm_head
    if type(head) is not nn.Linear:
        return set()
    # What the norm returns is never changed in place: its warning is for those who do.
    warnings.filterwarnings("ignore", "FSDP2-wrapped module .*RMSNorm.* returned a view")
    norm.add_module("head", head)  # for as long as its parameters are looked for
    try:
        fully_shard(norm, mesh=mesh, mp_policy=policy, reshard_after_forward=False)
    finally:
        del norm._modules["head"]
    return {*norm.parameters(), *head.parameters()}


def can_spread_embeddings(
    model: NemotronV3ForCausalLM | NemotronV3Model, meshes: Meshes, policy: MixedPrecisionPolicy
) -> bool:
    """Whether `spread_embeddings` may be called: one set of processes, and no other use."""
    plan, shard = meshes.plan, meshes.plan.set_size
    backbone = model.model if isinstance(model, NemotronV3ForCausalLM) else model
    weight = backbone.embeddings.weight
    return (
        plan.dp_replicate == 1
        and shard > 1
        and type(backbone.embeddings) is nn.Embedding
        and not model.config.tie_word_embeddings
        and policy.param_dtype in (None, weight.dtype)
        and len(weight) % shard == 0
    )


def spread_embeddings(backbone: NemotronV3Model, meshes: Meshes) -> set[nn.Parameter]:
    """Leave each process some rows of the matrix, and send the rows of tokens about instead.

    T rows of D travel where the whole matrix would, V rows: in the first pass of a step before all
    else, and its gradient after all else, when nothing is left to compute meanwhile.
    """
    embeddings, mesh = backbone.embeddings, meshes.dense["dp_shard"]
    embeddings.weight = first_rows(embeddings.weight, mesh)
    counts = TokenCounts(meshes.host_shard, backbone)
    look_up = partial(_look_up, embeddings, mesh.get_group(), counts)
    embeddings.forward = look_up  # type: ignore[method-assign]
    return {embeddings.weight}


def _look_up(
    embeddings: nn.Embedding, group: ProcessGroup, counts: TokenCounts, input_ids: Tensor
) -> Tensor:
    ids, weight = input_ids.flatten(), embeddings.weight
    assert isinstance(weight, DTensor)
    most = max(counts.of(len(ids)))
    everyone = gathered(F.pad(ids, (0, most - len(ids))), group)  # [R n]
    V = weight.shape[0]
    each = V // group.size()
    # Rows of others are read at some place here, each at another one, and left out. What is no
    # token stays so, and is refused as always.
    token = (everyone >= 0) & (everyone < V)
    rows = F.embedding(torch.where(token, everyone % each, everyone), weight.to_local())
    here = everyone // each == group.rank()
    found = sums_of(rows.where(here[:, None], 0), group)()[: len(ids)]
    return found.unflatten(0, input_ids.shape)
