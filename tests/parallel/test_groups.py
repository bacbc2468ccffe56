"""How the host gathers weights and sums gradients makes no difference to either."""

import pytest
import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed.fsdp import FSDPModule
from torch.distributed.tensor import DTensor, Replicate, Shard

from nemotron_v3 import NemotronV3ForCausalLM
from nemotron_v3.parallel import Plan, collectives, gradient_norm, parallelize
from nemotron_v3.parallel.fsdp import shard_model
from tests.models import tiny_model
from tests.parallel.equality import whole
from tests.parallel.processes import run

PATTERN = "ME*EM-"
IDS = torch.arange(24)


def stepped(model: NemotronV3ForCausalLM, processes: int) -> dict[str, Tensor]:
    """Gradients of two passes and what they leave after a step, twice over."""
    model.train()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1, foreach=False)
    for _ in range(2):
        optimizer.zero_grad()
        for number in range(2):
            ids = (IDS + number) % 90
            model(ids, labels=ids, num_items_in_batch=2 * 23 * processes).loss.backward()
        found = {f"grad {n}": whole(p.grad) for n, p in model.named_parameters()}
        found["norm"] = gradient_norm(model.parameters())
        optimizer.step()
    return found | {n: whole(p) for n, p in model.named_parameters()}


def groups(rank: int) -> None:
    """Blocks a group, what stays gathered and what is recomputed, with both processes alike."""
    alone = tiny_model(PATTERN).double()
    block = 8 * sum(p.numel() for p in alone.model.layers[0].parameters())
    wanted = stepped(alone, 1)
    counted = {}
    for reshard, size, every in (
        (False, 0, None), (False, 2 * block, None), (False, 2 * block, 2), (False, 2**40, 1),
        (True, 2**40, 2), (None, 2**28, None),
    ):  # fmt: skip
        model = parallelize(
            tiny_model(PATTERN).double(),
            Plan(ep=2),
            reshard_after_forward=reshard,
            group_bytes=size,
        )
        if every:
            model.gradient_checkpointing_enable(every=every)
        found = stepped(model, 2)
        counted[reshard, size] = sum(isinstance(b, FSDPModule) for b in model.model.layers)
        for name, tensor in wanted.items():
            error = (found[name] - tensor).abs().max() / tensor.abs().max()
            assert error <= 1e-12, f"{reshard} {size} {every} {name}: {float(error):.1e}"
    assert counted[False, 0] == counted[True, 2**40] == len(PATTERN)
    assert 1 < counted[False, 2 * block] < len(PATTERN)
    assert counted[False, 2**40] == counted[None, 2**28] == 1


def replicas(rank: int) -> None:
    """Mixers' fp32 tensors are whole on all processes; their gradients travel once a pass."""
    model = parallelize(tiny_model("MEM*").to(torch.bfloat16), Plan(ep=2)).train()
    kept = [p for p in model.parameters() if p.dtype == torch.float32]
    assert len(kept) == 6
    assert all(isinstance(p, DTensor) and p.placements == (Replicate(),) for p in kept)
    sizes, gather = [], collectives._all_gather

    def counting(out: Tensor, x: Tensor, **kwargs):
        sizes.append((x.dtype, x.numel()))
        return gather(out, x, **kwargs)

    collectives._all_gather = counting
    ids = (IDS + rank) % 90
    for number in (1, 2):
        model(ids, labels=ids, num_items_in_batch=46).loss.backward()
        together = (torch.float32, sum(p.numel() for p in kept))
        assert sizes.count(together) == number
    with torch.no_grad():
        model.eval()(ids)
    assert sizes.count(together) == 2
    collectives._all_gather = gather
    for p in kept:
        mine = p.grad.to_local()
        parts = [torch.empty_like(mine) for _ in range(2)]
        dist.all_gather(parts, mine)
        assert torch.equal(*parts) and mine.abs().max() > 0


def frozen(rank: int) -> None:
    """Nothing travels for what is not trained."""
    model = parallelize(tiny_model("M-").requires_grad_(False), Plan())
    model.model.layers[1].requires_grad_(True)
    model(IDS, labels=IDS).loss.backward()
    assert all((p.grad is None) == (not p.requires_grad) for p in model.parameters())
    sharded = shard_model(tiny_model("ME"))
    assert all(p.placements == (Shard(0),) for p in sharded.parameters())


@pytest.mark.integration
def test_groups_of_blocks_and_whole_small_tensors():
    run([groups, replicas, frozen], 2)
