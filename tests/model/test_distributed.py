"""DDP and FSDP2 in two processes, against the same model in one.

Each process computes its half of a batch. What must come out is known without either: the mean of
the two halves' gradients, exactly, since a sum of two numbers has no order.
"""

import copy
import os
import sys
import tempfile
import time
from collections.abc import Callable
from datetime import timedelta
from pathlib import Path

import pytest
import torch
import torch.distributed as dist
import torch.multiprocessing as mp
from torch import Tensor, nn
from torch.distributed.fsdp import MixedPrecisionPolicy
from torch.nn.parallel import DistributedDataParallel

from nemotron_v3 import NemotronV3ForCausalLM
from nemotron_v3.model.output import LazyLogits
from nemotron_v3.parallel import shard_model
from tests.models import tiny_config, tiny_model, tokens

PROCESSES = 2
SECONDS = 90


def run(worker: Callable[[int], None]) -> None:
    """`worker(rank)` in two processes; a failure or a hang in one of them fails the test."""
    with tempfile.TemporaryDirectory() as folder:
        context = mp.spawn(
            _process, (worker, str(Path(folder) / "meeting")), nprocs=PROCESSES, join=False
        )
        deadline = time.monotonic() + SECONDS
        try:
            while not context.join(timeout=1):
                assert time.monotonic() < deadline, f"not finished after {SECONDS} s"
        finally:
            for process in context.processes:
                process.kill()


def _process(rank: int, worker: Callable[[int], None], meeting: str) -> None:
    torch.set_num_threads(1)
    if sys.platform == "linux":  # the host's name may lead to an address nobody answers at
        os.environ.setdefault("GLOO_SOCKET_IFNAME", "lo")
    dist.init_process_group(
        "gloo",
        init_method=f"file://{meeting}",
        rank=rank,
        world_size=PROCESSES,
        timeout=timedelta(seconds=SECONDS),
    )
    worker(rank)
    dist.barrier()
    # Not the usual way out: gloo's threads, still running then, now and then abort the process.
    os._exit(0)


def half(rank: int) -> dict[str, Tensor]:
    ids = tokens(PROCESSES, 40)[rank : rank + 1]
    return {"input_ids": ids, "labels": ids}


def half_or_padding(rank: int) -> dict[str, Tensor]:
    """The last process has run out of data."""
    mask = torch.full((1, 40), int(rank + 1 < PROCESSES))
    return half(rank) | {"attention_mask": mask}


def expected_gradients(model: nn.Module, batch_of: Callable = half) -> dict[str, Tensor]:
    """The mean over both halves, summed in fp32, in the dtype of the parameter."""
    total: dict[str, Tensor] = {}
    for rank in range(PROCESSES):
        model.zero_grad()
        model(**batch_of(rank)).loss.backward()
        for name, parameter in model.named_parameters():
            gradient = parameter.grad.float() / PROCESSES
            total[name] = total[name] + gradient if name in total else gradient
    return {n: total[n].to(p.dtype) for n, p in model.named_parameters()}


def assert_equal(measured: dict[str, Tensor], expected: dict[str, Tensor]) -> None:
    assert measured.keys() == expected.keys()
    different = [n for n in expected if not torch.equal(measured[n], expected[n])]
    assert not different, different
    assert all(measured[n].dtype == expected[n].dtype for n in expected)


def ddp(rank: int) -> None:
    model = tiny_model(tie_word_embeddings=True)
    gradients = expected_gradients(alone := copy.deepcopy(model))
    shared = DistributedDataParallel(model)
    out = shared(**half(rank))
    assert torch.equal(out.logits, alone(**half(rank)).logits)
    out.loss.backward()
    assert_equal({n: p.grad for n, p in model.named_parameters()}, gradients)


def ddp_that_looks_into_outputs(rank: int) -> None:
    """For parameters without a gradient, or for the order in which gradients come."""
    for option in ("find_unused_parameters", "static_graph"):
        model = tiny_model()
        gradients = expected_gradients(copy.deepcopy(model))
        shared = DistributedDataParallel(model, **{option: True})
        for _ in range(2):  # a static graph is learnt in the first step
            model.zero_grad()
            out = shared(**half(rank))
            assert isinstance(out._logits, LazyLogits), "the logits were computed to look into them"
            out.loss.backward()
            assert_equal({n: p.grad for n, p in model.named_parameters()}, gradients)
        model.zero_grad()
        logits = shared(half(rank)["input_ids"]).logits
        logits.square().sum().backward()
        assert all(p.grad is not None for p in model.parameters())


def fsdp_of_a_bf16_model(rank: int) -> None:
    """fp32 A_log, D and dt_bias among bf16 parameters; a tied head; recomputed blocks."""
    model = tiny_model(tie_word_embeddings=True).bfloat16()
    gradients = expected_gradients(alone := copy.deepcopy(model))
    model.gradient_checkpointing_enable()
    shard_model(model, mp_policy=MixedPrecisionPolicy(reduce_dtype=torch.float32))
    out = model(**half(rank))
    assert torch.equal(out.logits, alone(**half(rank)).logits)
    out.loss.backward()
    parameters = dict(model.named_parameters())
    assert {p.dtype for p in parameters.values()} == {torch.bfloat16, torch.float32}
    assert all(p.to_local().numel() < p.numel() for p in parameters.values())
    assert_equal({n: p.grad.full_tensor() for n, p in parameters.items()}, gradients)

    optimisers = [torch.optim.AdamW(m.parameters(), lr=1e-2) for m in (model, alone)]
    for name, parameter in alone.named_parameters():
        parameter.grad = gradients[name]
    for optimiser in optimisers:
        optimiser.step()
    after = {n: p.full_tensor() for n, p in model.named_parameters()}
    assert_equal(after, {n: p.detach() for n, p in alone.named_parameters()})


def fsdp_computing_in_bf16(rank: int) -> None:
    """fp32 parameters gathered as bf16, except those that must not be rounded: the numbers of a
    bf16 model, whose fp32 tensors a cast leaves alone."""
    model = tiny_model()
    alone = copy.deepcopy(model).bfloat16()
    policy = MixedPrecisionPolicy(param_dtype=torch.bfloat16, reduce_dtype=torch.float32)
    shard_model(model, mp_policy=policy)
    out = model(**half(rank))
    assert torch.equal(out.logits, alone(**half(rank)).logits)
    out.loss.backward()
    sums = expected_gradients(alone)
    measured = {n: p.grad.full_tensor() for n, p in model.named_parameters()}
    assert {g.dtype for g in measured.values()} == {torch.float32}
    rounded = {n: g.to(sums[n].dtype) for n, g in measured.items()}
    assert_equal(rounded, sums)


LATENT_AND_BIASES = {"moe_latent_size": 28, "attention_bias": True, "tie_word_embeddings": True}


def ddp_where_one_has_padding_alone(rank: int) -> None:
    for changes in ({}, LATENT_AND_BIASES):
        model = tiny_model(**changes)
        gradients = expected_gradients(copy.deepcopy(model), half_or_padding)
        shared = DistributedDataParallel(model)
        for _ in range(2):  # the second step finds what the first left undone
            model.zero_grad()
            shared(**half_or_padding(rank)).loss.backward()
            assert_equal({n: p.grad for n, p in model.named_parameters()}, gradients)


def fsdp_where_one_has_padding_alone(rank: int) -> None:
    for changes in ({}, LATENT_AND_BIASES):
        model = tiny_model(**changes)
        gradients = expected_gradients(copy.deepcopy(model), half_or_padding)
        shard_model(model)
        for _ in range(2):
            model.zero_grad()
            model(**half_or_padding(rank)).loss.backward()
            found = {n: p.grad.full_tensor() for n, p in model.named_parameters()}
            assert_equal(found, gradients)


def fsdp_from_the_meta_device(rank: int) -> None:
    """The weights of one process with the first one's seed, in parts; then a step."""
    torch.manual_seed(0)
    alone = NemotronV3ForCausalLM(tiny_config(moe_latent_size=28))
    torch.manual_seed(0)
    alone.init_weights()
    with torch.device("meta"):
        model = NemotronV3ForCausalLM(tiny_config(moe_latent_size=28))
    shard_model(model)
    model.to_empty(device="cpu")
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.fill_(float("nan"))
    torch.manual_seed(rank)
    model.init_weights()
    drawn = {n: p.full_tensor() for n, p in model.named_parameters()}
    assert_equal(drawn, {n: p.detach() for n, p in alone.named_parameters()})
    assert all(p.to_local().numel() < p.numel() for p in model.parameters())
    gradients = expected_gradients(alone)
    model(**half(rank)).loss.backward()
    assert_equal({n: p.grad.full_tensor() for n, p in model.named_parameters()}, gradients)


def fsdp_that_casts_inputs(rank: int) -> None:
    """All blocks of a pass see one layout, and so do hooks on their mixers, of whatever type."""
    model, seen, in_mixers = tiny_model(), [], []
    policy = MixedPrecisionPolicy(param_dtype=torch.bfloat16, reduce_dtype=torch.float32)
    shard_model(model, mp_policy=policy)
    for block in model.model.layers:
        block.register_forward_pre_hook(
            lambda module, args, kwargs: seen.append(kwargs["context"].layout), with_kwargs=True
        )
        block.mixer.register_forward_pre_hook(
            lambda module, args, kwargs: in_mixers.append(kwargs["layout"]), with_kwargs=True
        )
    model(**half(rank)).loss.backward()
    assert len(seen) == len(in_mixers) == len(model.model.layers)
    assert all(each is seen[0] for each in seen)
    assert all(each is in_mixers[0] for each in in_mixers)
    assert in_mixers[0] in (seen[0], seen[0].packed)  # packed: padding left out


WORKERS = [
    *(ddp, ddp_that_looks_into_outputs, ddp_where_one_has_padding_alone),
    *(fsdp_of_a_bf16_model, fsdp_computing_in_bf16, fsdp_where_one_has_padding_alone),
    *(fsdp_from_the_meta_device, fsdp_that_casts_inputs),
]


def every_worker(rank: int) -> None:
    for worker in WORKERS:
        try:
            worker(rank)
        except Exception as error:
            error.add_note(f"in {worker.__name__}")
            raise


def test_ddp_and_fsdp2_compute_what_one_process_computes():
    """One pair of processes for all: most of the time goes into starting them."""
    run(every_worker)


def test_sharding_says_what_it_needs():
    with pytest.raises(RuntimeError, match="no process group"):
        shard_model(tiny_model())
    with pytest.raises(TypeError, match="got a Linear"):
        shard_model(nn.Linear(2, 2))
