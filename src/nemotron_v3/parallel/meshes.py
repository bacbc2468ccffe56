"""The processes of a plan as two meshes over the same ranks: for dense tensors, for experts."""

from dataclasses import dataclass

import torch.distributed as dist
from torch.distributed import ProcessGroup
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh

from nemotron_v3.parallel.agreement import joined
from nemotron_v3.parallel.plan import Plan


@dataclass(frozen=True)
class Meshes:
    """Where the parts of tensors lie.

    Attributes:
        plan: with all sizes settled.
        dense: of `dp_replicate` and `dp_shard`.
        sparse: of `dp_replicate`, `efsdp` and `ep`: `efsdp = dp_shard / ep` processes share the
            rows of the same experts.
        host: all processes, through the hosts.
        host_shard, host_ep: the processes of `dp_shard` and of `ep` of which this is one, likewise.
    """

    plan: Plan
    dense: DeviceMesh
    sparse: DeviceMesh
    host: ProcessGroup
    host_shard: ProcessGroup
    host_ep: ProcessGroup

    @classmethod
    def of(cls, plan: Plan, device_type: str, host: ProcessGroup) -> "Meshes":
        """For a plan with all sizes settled; every process makes them, in the same order."""
        shard = plan.dp_shard or 1
        dense = init_device_mesh(
            device_type, (plan.dp_replicate, shard), mesh_dim_names=("dp_replicate", "dp_shard")
        )
        sparse = init_device_mesh(
            device_type,
            (plan.dp_replicate, shard // plan.ep, plan.ep),
            mesh_dim_names=("dp_replicate", "efsdp", "ep"),
        )
        rows = (dense.mesh.view(-1, shard), sparse.mesh.view(-1, plan.ep))
        hosts = [
            joined(dist.new_subgroups_by_enumeration(ranks.tolist(), backend="gloo")[0])
            for ranks in rows
        ]
        return cls(plan, dense, sparse, host, *hosts)

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
