"""The processes of a plan as two meshes over the same ranks, for dense tensors and for experts, and
as groups that share tokens."""

from dataclasses import dataclass

import torch.distributed as dist
from torch import Tensor
from torch.distributed import ProcessGroup
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh

from nemotron_v3.parallel.agreement import joined
from nemotron_v3.parallel.plan import Plan


@dataclass(frozen=True)
class Meshes:
    """Where the parts of tensors lie.

    Attributes:
        plan: with all sizes settled.
        dense: of `dp_replicate` and `dp_shard`, here the processes of a set: all of them share the
            rows of its tensors, whose tokens they have.
        sparse: of `dp_replicate`, `efsdp` and `ep`: `efsdp` processes share the rows of the same
            experts.
        host: all processes, through the hosts.
        host_shard, host_ep: the processes of a set and of `ep` of which this is one, likewise.
        cp: those that share the tokens of this one's batch; None where each has its own.
    """

    plan: Plan
    dense: DeviceMesh
    sparse: DeviceMesh
    host: ProcessGroup
    host_shard: ProcessGroup
    host_ep: ProcessGroup
    cp: ProcessGroup | None

    @classmethod
    def of(cls, plan: Plan, device_type: str, host: ProcessGroup) -> "Meshes":
        """For a plan with all sizes settled; every process makes them, in the same order."""
        shard = plan.set_size
        dense = init_device_mesh(
            device_type, (plan.dp_replicate, shard), mesh_dim_names=("dp_replicate", "dp_shard")
        )
        sparse = init_device_mesh(
            device_type,
            (plan.dp_replicate, shard // plan.ep, plan.ep),
            mesh_dim_names=("dp_replicate", "efsdp", "ep"),
        )
        of_set, of_ep = (_group_of(dense.mesh, each, "gloo") for each in (shard, plan.ep))
        cp = _group_of(dense.mesh, plan.cp) if plan.cp > 1 else None
        return cls(plan, dense, sparse, host, of_set, of_ep, cp)

    def of_dense(self) -> DeviceMesh:
        """What `fully_shard` takes for tensors that are no expert's."""
        return self.dense if self.plan.dp_replicate > 1 else self.dense["dp_shard"]

    def of_experts(self) -> DeviceMesh:
        """What `fully_shard` takes for the experts, of which a process holds some already."""
        if self.plan.dp_replicate > 1:
            return self.sparse["dp_replicate", "efsdp"]
        return self.sparse["efsdp"]

    @property
    def ep(self) -> DeviceMesh:
        return self.sparse["ep"]


def _group_of(ranks: Tensor, each: int, backend: str | None = None) -> ProcessGroup:
    """The group that this process is in, of so many ranks each that follow each other."""
    groups = ranks.view(-1, each).tolist()
    return joined(dist.new_subgroups_by_enumeration(groups, backend=backend)[0])
