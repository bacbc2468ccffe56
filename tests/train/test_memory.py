"""The plan's memory against what runs really hold."""

from dataclasses import replace

import pytest
import torch

from nemotron_v3 import from_pretrained
from nemotron_v3.model import cost
from nemotron_v3.train.build import read_model_config
from nemotron_v3.train.memory import estimate, recomputed_blocks
from nemotron_v3.train.options import (
    LoraOptions,
    MemoryOptions,
    ModelOptions,
    OptimizerOptions,
    ScheduleOptions,
)
from nemotron_v3.train.plan import make_plan
from tests.models import tiny_model, tokens
from tests.train.fakes import made_up_options

SIZES = {
    "hidden_size": 256,
    "num_attention_heads": 8,
    "head_dim": 32,
    "mamba_num_heads": 16,
    "mamba_head_dim": 32,
    "ssm_state_size": 64,
    "chunk_size": 64,
    "intermediate_size": 512,
    "moe_intermediate_size": 128,
    "moe_shared_expert_intermediate_size": 256,
}


def held_for_backward(model, ids) -> int:
    """Bytes of the storages that autograd keeps, those of parameters aside."""
    own = {p.untyped_storage().data_ptr() for p in [*model.parameters(), *model.buffers()]}
    sizes: dict[int, int] = {}
    keep = []

    def pack(tensor: torch.Tensor) -> torch.Tensor:
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in own:
            sizes[storage.data_ptr()] = storage.nbytes()
            keep.append(tensor)
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        model(ids, labels=ids)
    return sum(sizes.values())


@pytest.mark.parametrize("pattern", ["MM", "**", "--", "EE"])
def test_the_activations_of_each_kind_of_block_are_those_that_autograd_holds(options, pattern):
    """What one block holds, as the difference of two models."""
    memory = MemoryOptions(rows_per_pass=1, checkpoint_every=0)
    asked = options(data=made_up_options(tokens_per_row=512), memory=memory)
    held, told = [], []
    for text in (pattern[:1], pattern):
        model = tiny_model(text, dtype=torch.float32, **SIZES)
        held.append(held_for_backward(model, tokens(1, 512)))
        run = estimate(asked, model.config, torch.float32, 1, kernels=False)
        told.append(run.activations)
    assert told[1] - told[0] == pytest.approx(held[1] - held[0], rel=0.25)


def test_weights_gradients_and_moments_are_those_of_the_model(options):
    for dtype, moments in ((torch.float32, 8), (torch.bfloat16, 8)):
        model = tiny_model("ME*-", dtype=dtype)
        told = estimate(options(), model.config, dtype, 1)
        weights = sum(t.nbytes for t in [*model.parameters(), *model.buffers()])
        assert told.weights == weights == told.gradients
        count = cost.parameters(model.config).total
        assert told.optimizer >= moments * count
    many = estimate(options(), model.config, torch.bfloat16, 4)
    assert many.optimizer < told.optimizer and many.activations == told.activations


def test_a_plan_counts_and_says_what_to_change(options):
    asked = options(schedule=ScheduleOptions(steps=10), memory=MemoryOptions(rows_per_pass=4))
    plan = make_plan(asked, mfu=0.5)
    assert plan.steps == 10 and plan.tokens_per_step == 4 * 32 and plan.advice == ()
    # The routers' biases are moved by no gradient: a run does not count them either.
    trained = [p for p in from_pretrained(asked.model.path).parameters() if p.requires_grad]
    assert plan.trainable == sum(p.numel() for p in trained) < plan.total
    assert plan.seconds is None
    known = replace(asked, log=replace(asked.log, peak_tflops=1e-3))
    assert make_plan(known, 0.5).seconds == pytest.approx(10 * plan.flops_per_step / 0.5e9)
    tight = make_plan(asked, 0.5, room=plan.memory.total - 2**10)
    assert "does not fit" in tight.advice[0] and "rows_per_pass = 1" in tight.advice[1]
    hopeless = make_plan(asked, 0.5, room=1000)
    assert "smaller model" in hopeless.advice[-1]
    assert not asked.out.exists()


def test_a_plan_of_a_large_model_needs_no_memory(options):
    asked = options(
        model=ModelOptions(preset="nemotron-3-nano-30b", dtype="bfloat16", device="cpu"),
        optimizer=OptimizerOptions(bf16_weights="master"),
    )
    plan = make_plan(asked, 0.4, room=80 * 2**30)
    assert plan.total > 30e9 and plan.memory.weights == pytest.approx(2 * plan.total, rel=0.01)
    largest = 128 * 1856 * 2688  # a stack of experts, which is updated as one
    # What an update needs comes where activations and logits were.
    there = plan.memory.activations + plan.memory.logits
    assert plan.memory.optimizer == 12 * plan.total + 12 * largest - there
    assert [line.strip().partition(":")[0] for line in plan.advice][-1] == "lora.rank = 16"


def test_by_memory_as_few_blocks_are_recomputed_as_fit(options):
    """Of Nano: first those of attention and experts are kept, and of each kind the last ones."""
    asked = options(
        model=ModelOptions(preset="nemotron-3-nano-30b", dtype="bfloat16", device="cpu"),
        lora=LoraOptions(rank=16, groups=("attention", "mamba", "shared", "routed")),
        data=made_up_options(tokens_per_row=8192),
    )
    config = read_model_config(asked.model, torch.device("cpu"))
    kinds = config.layers_block_type
    told = []
    for gib in (60, 70, 78, 90):
        memory = MemoryOptions(checkpoint_every="auto", device_gib=gib)
        chosen = replace(asked, memory=memory)
        blocks = recomputed_blocks(chosen, config, torch.bfloat16, 1)
        total = estimate(chosen, config, torch.bfloat16, 1).total / 2**30
        assert gib == 60 or gib - 0.6 < total <= gib or not blocks
        told.append(blocks)
        for kind in ("moe", "attention", "mamba"):
            own = [n for n in range(len(kinds)) if kinds[n] == kind]
            kept = [n for n in own if n not in blocks]
            assert kept == own[len(own) - len(kept) :]
    every, some, most, none = map(len, told)
    assert every == len(kinds) > some > most > none == 0
    assert {kinds[n] for n in told[2]} == {"mamba"}
    whole = replace(asked, memory=MemoryOptions(checkpoint_every=1))
    assert recomputed_blocks(whole, config, torch.bfloat16, 1) == tuple(range(len(kinds)))
