"""What processes refuse to do together: on all of them, before anything is changed."""

import re
from functools import partial
from pathlib import Path

import pytest
import torch
from torch import nn
from torch.distributed.tensor import DTensor

from nemotron_v3 import NemotronV3ForCausalLM, from_pretrained, save_pretrained
from nemotron_v3.checkpoint import load_parts
from nemotron_v3.checkpoint.reader import Checkpoint
from nemotron_v3.parallel import Plan, parallelize
from nemotron_v3.parallel.agreement import Disagreement
from tests.models import tiny_config, tiny_model
from tests.parallel.processes import run


def refused(model, plan, error, told):
    """That this process is told so, and that the model is as it was."""
    before = [type(p) for p in model.parameters()]
    with pytest.raises(error, match=told):
        parallelize(model, plan)
    assert [type(p) for p in model.parameters()] == before


def refusals(rank: int) -> None:
    refused(tiny_model("E"), Plan(ep=3), ValueError, "ep = 3 does not divide dp_shard = 2")
    odd = tiny_model("E", n_routed_experts=7)
    refused(odd, Plan(ep=2), ValueError, "ep = 2 does not divide the 7 experts of a layer")
    refused(nn.Linear(2, 2), Plan(), ValueError, "got a Linear")
    # What only one of them does, the other hears of.
    plan = Plan(ep=2) if rank else Plan()
    refused(tiny_model("E"), plan, Disagreement, "rank 1 has the plan = Plan.*ep=2")
    wider = tiny_model("E", moe_intermediate_size=32 if rank else 24)
    refused(wider, Plan(ep=2), Disagreement, "rank 1 has the config")
    other = tiny_model("E", seed=rank)
    refused(other, Plan(ep=2), Disagreement, "rank 1 has .*first values")
    frozen = tiny_model("E").requires_grad_(not rank)
    refused(frozen, Plan(ep=2), Disagreement, "rank 1 has .*frozen.* where others have .*trained")
    model = tiny_model("E") if rank else nn.Linear(2, 2)
    refused(model, Plan(ep=2), Disagreement, "rank 0: parallelize takes a NemotronV3ForCausalLM")
    spread = parallelize(tiny_model("E"), Plan(ep=2))
    refused(spread, Plan(ep=2), ValueError, "spread over processes already")


def from_the_meta_device(rank: int) -> None:
    """What one process draws with the first one's seed, in parts."""
    torch.manual_seed(0)
    alone = NemotronV3ForCausalLM(tiny_config("ME*E", moe_latent_size=28))
    for plan in (Plan(ep=2), Plan()):
        model = bare(plan, moe_latent_size=28)
        torch.manual_seed(rank)
        model.init_weights()
        torch.manual_seed(0)
        alone.init_weights()
        for (name, found), drawn in zip(model.named_parameters(), alone.parameters(), strict=True):
            assert torch.equal(found.full_tensor(), drawn), name


def bare(plan: Plan, **changes) -> NemotronV3ForCausalLM:
    """A spread model with what was in memory."""
    with torch.device("meta"):
        model = NemotronV3ForCausalLM(tiny_config("ME*E", **changes))
    return parallelize(model, plan, device_type="cpu").to_empty(device="cpu")


def parts_of(folder: Path, rank: int) -> None:
    """Each process reads the experts that are its own, and what it has of other tensors."""
    alone, read = from_pretrained(folder), []
    for plan in (Plan(ep=2), Plan(dp_replicate=2, dp_shard=1), Plan()):
        model = bare(plan)
        read.clear()
        copy_to = Checkpoint.copy_to

        def noting(self, name, target, copy_to=copy_to):
            read.append(name)
            copy_to(self, name, target)

        Checkpoint.copy_to = noting
        load_parts(model, folder)
        Checkpoint.copy_to = copy_to
        tensors = dict(model.named_parameters()) | dict(model.named_buffers())
        for name, tensor in (dict(alone.named_parameters()) | dict(alone.named_buffers())).items():
            found = tensors[name]
            found = found.full_tensor() if isinstance(found, DTensor) else found
            assert torch.equal(found, tensor) and found.dtype == tensor.dtype, name
        experts = {int(m[1]) for n in read if (m := re.search(r"\.experts\.(\d+)\.", n))}
        if plan.ep == 2:
            assert experts == set(range(4 * rank, 4 * rank + 4))
    with torch.device("meta"), pytest.raises(ValueError, match="has no storage"):
        load_parts(NemotronV3ForCausalLM(tiny_config("ME*E")), folder)


@pytest.mark.integration
def test_processes_that_differ_are_named_on_all_of_them(tmp_path):
    """And what they begin with where they do not: drawn, or read."""
    save_pretrained(tiny_model("ME*E"), tmp_path)
    run([refusals, from_the_meta_device, partial(parts_of, tmp_path)], 2)


def test_one_process_alone_is_told_to_start_others():
    with pytest.raises(RuntimeError, match="no process group to spread over"):
        parallelize(tiny_model("E"))


def test_a_router_that_replays_repeats_its_choice_in_a_recomputation():
    """Where the choice would come out otherwise: a recomputed pass finds a moved bias."""
    model = tiny_model("E").double()
    router, chosen = model.model.layers[0].mixer.gate, []
    router.replays = True
    model.gradient_checkpointing_enable()
    experts = model.model.layers[0].mixer.experts
    experts.register_forward_pre_hook(lambda module, args: chosen.append(args[1].clone()))
    ids = torch.arange(20)
    with torch.no_grad():
        model(ids)
    model(ids, labels=ids).loss.backward()
    expected = [p.grad.clone() for p in model.parameters()]
    model.zero_grad()
    loss = model(ids, labels=ids).loss
    router.e_score_correction_bias.neg_()
    loss.backward()
    with torch.no_grad():
        model(ids)
    assert all(torch.equal(chosen[0], other) for other in chosen[1:5])
    assert not torch.equal(chosen[0], chosen[5])
    assert all(torch.equal(p.grad, e) for p, e in zip(model.parameters(), expected, strict=True))
