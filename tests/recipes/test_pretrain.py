import math
import os
import signal
from itertools import islice

import pytest
import torch

from nemotron_v3.config import NemotronV3Config
from nemotron_v3.data.packing import Pack, pack_whole, training_packs
from nemotron_v3.layout import SequenceLayout
from nemotron_v3.model.model import NemotronV3ForCausalLM
from nemotron_v3.recipes.pretrain import (
    LEAST,
    Balancer,
    Optimization,
    deferred_interrupt,
    pretrain,
    total_loss,
)

CONFIG = NemotronV3Config(
    hybrid_override_pattern="ME*-",
    vocab_size=16,
    hidden_size=16,
    num_attention_heads=2,
    num_key_value_heads=1,
    head_dim=8,
    mamba_num_heads=2,
    mamba_head_dim=8,
    ssm_state_size=8,
    n_groups=1,
    chunk_size=8,
    intermediate_size=32,
    n_routed_experts=4,
    moe_intermediate_size=16,
    moe_shared_expert_intermediate_size=16,
    dtype=torch.float32,
)
# Counting up and down: what comes next is certain once two tokens were seen.
DOCUMENTS = [[*range(2, 16), *range(14, 1, -1)] * 2, [*range(15, 1, -1), *range(3, 16)] * 2]
OPTIMIZATION = Optimization(learning_rate=1e-2, weight_decay=0.1)


def fresh_model() -> NemotronV3ForCausalLM:
    torch.manual_seed(0)
    return NemotronV3ForCausalLM(CONFIG)


def run(model: NemotronV3ForCausalLM, steps: int, optimization: Optimization = OPTIMIZATION):
    packs = training_packs(DOCUMENTS, tokens=64, max_length=32, seed=0)
    return list(pretrain(model, packs, optimization, 2.0, lambda step, seconds: step / steps))


def test_the_rate_rises_to_its_top_and_falls_to_nothing_at_the_end():
    scale = Optimization(1.0, 0.1, warmup=0.2).scale
    assert [scale(x) for x in (0.0, 0.1, 0.2, 0.6, 1.0)] == pytest.approx([0.01, 0.5, 1, 0.5, 0.01])


def test_training_takes_the_steps_asked_for_and_learns():
    model = fresh_model()
    before = total_loss(model, pack_whole(DOCUMENTS, 64))
    steps = run(model, 60)
    after = total_loss(model, pack_whole(DOCUMENTS, 64))
    assert [s.step for s in steps] == list(range(1, 61))
    assert [s.tokens for s in steps] == list(range(64, 64 * 60 + 1, 64))
    assert after < 0.5 * before
    assert steps[-1].loss < 0.5 * steps[0].loss


def test_the_same_seed_gives_the_same_losses_and_weights():
    first, second = fresh_model(), fresh_model()
    losses = [[s.loss for s in run(model, 5)] for model in (first, second)]
    assert losses[0] == losses[1]
    for ours, theirs in zip(first.parameters(), second.parameters(), strict=True):
        assert torch.equal(ours, theirs)


def test_the_clock_can_end_the_training_at_any_step():
    # A clock on which a step takes a tenth of the training.
    packs = training_packs(DOCUMENTS, 64, 32, seed=0)
    steps = pretrain(fresh_model(), packs, OPTIMIZATION, 2.0, lambda step, _: step / 10 + 0.75)
    rates = [step.learning_rate for step in steps]
    falling = [(1 - x) / 0.9 for x in (0.8, 0.9)]
    assert rates == pytest.approx([1e-2 * scale for scale in (*falling, LEAST)])


def test_the_first_loss_is_that_of_a_plain_forward_pass():
    pack = next(training_packs(DOCUMENTS, 64, 32, seed=0))
    logits = fresh_model()(input_ids=pack.input_ids, layout=pack.layout).logits
    borders = set(pack.layout.offsets)
    kept = torch.tensor([i for i in range(1, 64) if i not in borders])
    expected = torch.nn.functional.cross_entropy(logits[kept - 1], pack.input_ids[kept])
    step = run(fresh_model(), 1)[0]
    assert step.loss == pytest.approx(expected.item(), rel=1e-6)
    assert step.bits_per_byte == pytest.approx(step.loss / math.log(2) / 2.0)


def test_total_loss_is_the_sum_over_documents_alone():
    model = fresh_model()
    run(model, 5)
    alone = 0.0
    for document in DOCUMENTS:
        ids = torch.tensor(document)
        logits = model(input_ids=ids).logits
        alone += torch.nn.functional.cross_entropy(logits[:-1], ids[1:], reduction="sum").item()
    assert total_loss(model, pack_whole(DOCUMENTS, 1000)) == pytest.approx(alone, rel=1e-5)


def test_biases_move_against_the_load_and_hooks_do_not_stay():
    model = fresh_model()
    router = model.model.layers[1].mixer.gate
    with Balancer(model) as balancer:
        model(input_ids=torch.arange(16))
        hidden = torch.randn(12, CONFIG.hidden_size)
        _, experts = router(hidden)
        load = torch.bincount(experts.flatten(), minlength=4).float()
        balancer.step(0.5)
    assert torch.equal(router.e_score_correction_bias, 0.5 * torch.sign(6.0 - load))
    assert not router._forward_hooks


def test_balancing_evens_out_a_router_that_has_a_favourite():
    loads = {}
    for balance in (0.0, 0.05):
        model = fresh_model()
        router = model.model.layers[1].mixer.gate
        router.e_score_correction_bias[0] = 0.3
        run(model, 40, Optimization(1e-4, 0.0, balance=balance))
        seen: list[torch.Tensor] = []
        router.register_forward_hook(lambda _, __, out, seen=seen: seen.append(out[1]))
        pack = Pack(torch.tensor(DOCUMENTS[0]), SequenceLayout.from_lengths([len(DOCUMENTS[0])]))
        total_loss(model, [pack])
        loads[balance] = torch.bincount(seen[0].flatten(), minlength=4).max().item()
    assert loads[0.05] < loads[0.0] == len(DOCUMENTS[0])


def test_the_first_interrupt_waits_and_the_second_does_not():
    before = signal.getsignal(signal.SIGINT)
    with pytest.raises(KeyboardInterrupt), deferred_interrupt() as noted:
        assert not noted()
        os.kill(os.getpid(), signal.SIGINT)
        assert noted()
        os.kill(os.getpid(), signal.SIGINT)
    assert signal.getsignal(signal.SIGINT) is before


def test_packs_are_taken_one_a_step():
    taken = []
    packs = (taken.append(pack) or pack for pack in training_packs(DOCUMENTS, 64, 32, seed=0))
    steps = pretrain(fresh_model(), packs, OPTIMIZATION, 2.0, lambda step, seconds: step / 9)
    assert len(list(islice(steps, 3))) == len(taken) == 3
