"""Shared tokens, spread experts and sharded parameters at once, against one process."""

from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn

from nemotron_v3 import SequenceLayout
from nemotron_v3.layers.moe.routing_replay import record_routing, replay_routing
from nemotron_v3.parallel import Plan, by_mesh, parallelize
from nemotron_v3.parallel.context import context_parallel
from nemotron_v3.parallel.shares import Shares
from tests.models import tiny_model, tokens
from tests.parallel.equality import whole

GROUPS = ((0, 1), (2, 3))
LENGTHS = ([29], [7, 1, 3, 20])  # of the batch that each group shares
ITEMS = 28 + 6 + 2 + 19
SIZES: dict[str, Any] = {"n_routed_experts": 8, "num_experts_per_tok": 3}


def batch_of(group: int) -> dict[str, Any]:
    layout = SequenceLayout.from_lengths(LENGTHS[group])
    ids = tokens(layout.num_tokens, seed=group)
    return {"input_ids": ids, "labels": ids, "layout": layout, "num_items_in_batch": ITEMS}


def stepped(model: nn.Module) -> dict[str, Tensor]:
    """The gradients, and the parameters after a step."""
    found = {f"grad {n}": whole(p.grad) for n, p in model.named_parameters()}
    groups = by_mesh([{"params": list(model.parameters())}])
    torch.optim.SGD(groups, lr=0.1).step()
    return found | {n: whole(p) for n, p in model.named_parameters()}


def spread(rank: int) -> None:
    """Four processes: experts on two, parameters on four, each pair shares a batch."""
    groups = [dist.new_group(list(ranks)) for ranks in GROUPS]
    mine = rank // 2
    for dtype, allowed in ((torch.float64, 1e-12), (torch.float32, 1e-5)):
        for order in ("contiguous", "zigzag"):
            torch.set_default_dtype(dtype)
            alone = tiny_model("ME*-M", **SIZES).to(dtype).train()
            losses, routes = [], []
            for group in range(len(GROUPS)):
                with record_routing(alone) as record:
                    loss = alone(**batch_of(group)).loss
                loss.backward()
                losses.append(loss.detach())
                routes.append(record.indices)
            wanted = {"loss": torch.stack(losses).sum(), **stepped(alone)}

            model = parallelize(tiny_model("ME*-M", **SIZES).to(dtype), Plan(ep=2)).train()
            model.gradient_checkpointing_enable()
            shared = context_parallel(model, groups[mine], layout=order)
            layout = SequenceLayout.from_lengths(LENGTHS[mine])
            index = Shares.of(layout, 2, rank % 2, order).index
            own = {n: [c[index] for c in calls] for n, calls in routes[mine].items()}
            with replay_routing(model, own):
                part = shared(**batch_of(mine))
            part.backward()
            total = part.detach().clone()
            dist.all_reduce(total)
            found = {"loss": total, **stepped(model)}
            assert found.keys() == wanted.keys()
            for name, tensor in wanted.items():
                error = (found[name] - tensor).abs().max() / tensor.abs().max()
                assert error <= allowed, f"{dtype} {order} {name}: {float(error):.1e}"
