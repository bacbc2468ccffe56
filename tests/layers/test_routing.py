"""Routing watched, recorded and forced: exactly the same experts, under checkpoints too."""

import copy

import pytest
import torch
from torch.utils.checkpoint import checkpoint

from nemotron_v3 import BackendConfig, SequenceLayout
from nemotron_v3.layers import NemotronV3MoE
from nemotron_v3.layers.moe.load_balancing import BalanceLoss, ExpertLoad
from nemotron_v3.layers.moe.router import checkpoint_contexts, routers
from nemotron_v3.layers.moe.routing_replay import RoutingRecord, record_routing, replay_routing
from tests.models import labels_of, tiny_model, tokens

IDS, MASK = tokens(2, 20), torch.ones(2, 20)
MASK[1, 12:] = 0
LABELS = labels_of(IDS, MASK)
NAMES = ["model.layers.1.mixer.gate", "model.layers.6.mixer.gate"]


def moved(model):
    """The same model after something that changes its choices."""
    model = copy.deepcopy(model)
    with torch.no_grad():
        for router in routers(model).values():
            router.e_score_correction_bias.add_(torch.randn(8))
    return model


def equal(a: RoutingRecord, b: RoutingRecord) -> bool:
    assert a.indices.keys() == b.indices.keys()
    pairs = [zip(a.indices[n], b.indices[n], strict=True) for n in a.indices]
    return all(torch.equal(x, y) for pair in pairs for x, y in pair)


def record_of(model, **arguments):
    with record_routing(model) as record:
        out = model(IDS, MASK, **arguments)
    return record, out


def test_a_record_holds_the_real_tokens_of_every_router():
    model = tiny_model()
    record, out = record_of(model)
    assert list(record.indices) == NAMES
    assert [i.shape for calls in record.indices.values() for i in calls] == [(32, 3)] * 2
    assert torch.equal(out.logits, model(IDS, MASK).logits)  # watching changes nothing
    assert not any(router.observed for router in routers(model).values())


def test_a_replay_routes_as_recorded_whatever_the_bias_says():
    model = tiny_model()
    record, out = record_of(model)
    other = moved(model)
    free, _ = record_of(other)
    assert not equal(free, record)
    with replay_routing(other, record):
        replayed, again = record_of(other)
    assert equal(replayed, record)
    # The bias moves the choice alone: with the choice forced, the numbers are the same too.
    torch.testing.assert_close(again.logits, out.logits, rtol=0, atol=1e-6)
    assert equal(record_of(other)[0], free)  # and afterwards it is free again


def test_a_replay_has_the_gradients_of_a_model_that_chooses_so():
    model = tiny_model().double()
    record, out = record_of(model, labels=LABELS)
    names, parameters = zip(*model.named_parameters(), strict=True)
    expected = torch.autograd.grad(out.loss, parameters)
    with replay_routing(model, record):
        loss = model(IDS, MASK, labels=LABELS).loss
    for name, a, b in zip(names, torch.autograd.grad(loss, parameters), expected, strict=True):
        assert (a - b).abs().max() <= 1e-12 * b.abs().max(), name
        assert "gate" not in name or b.abs().max() > 0


def test_calls_are_replayed_in_their_order():
    model = tiny_model()
    with record_routing(model) as record:
        for part in IDS.split([7, 13], dim=1):
            model(part)
    other = moved(model)
    with replay_routing(other, record.indices), record_routing(other) as again:
        for part in IDS.split([7, 13], dim=1):
            other(part)
    assert equal(again, record)


def checkpointed(model):
    model.gradient_checkpointing_enable()
    return model


@pytest.mark.parametrize("inside", [True, False])
def test_a_checkpoint_recomputes_a_replayed_routing(inside):
    """Also when the backward pass comes after the replay, and between other forward passes."""
    model = tiny_model()
    record, _ = record_of(model)
    seen = {}
    for name, make in (("kept", moved), ("recomputed", lambda m: checkpointed(moved(m)))):
        torch.manual_seed(3)
        other = make(model)
        with replay_routing(other, record):
            loss = other(IDS, MASK, labels=LABELS).loss
            if inside:
                loss.backward()
        if not inside:
            other(tokens(2, 5, seed=9))
            loss.backward()
        seen[name] = [p.grad for p in other.parameters()]
    assert all(torch.equal(a, b) for a, b in zip(*seen.values(), strict=True))


def test_a_checkpoint_recomputes_the_same_routing_and_is_recorded_once():
    model = checkpointed(tiny_model())
    with record_routing(model) as record, ExpertLoad(model) as load:
        model(IDS, MASK, labels=LABELS).loss.backward()
    assert [len(calls) for calls in record.indices.values()] == [1, 1]
    assert all(int(counts.sum()) == 32 * 3 for counts in load.counts.values())
    recomputed = []
    with record_routing(model) as first:
        loss = model(IDS, MASK, labels=LABELS).loss
        for router in routers(model).values():
            choose = router._by_scores
            router._by_scores = lambda x, choose=choose: (
                recomputed.append(choose(x)) or recomputed[-1]
            )
        loss.backward()
    again = [indices for _, indices in reversed(recomputed)]
    assert len(again) == 2
    assert all(torch.equal(a, b[0]) for a, b in zip(again, first.indices.values(), strict=True))


def test_a_checkpoint_of_the_callers_own_is_told_or_refused():
    model = tiny_model()
    block = model.model.layers[1]
    x = torch.randn(2, 6, 48, requires_grad=True)
    with ExpertLoad(model) as load:
        y = checkpoint(block, x, use_reentrant=False)
        with pytest.raises(RuntimeError, match="context_fn=checkpoint_contexts"):
            y.sum().backward()
        load.reset()
        y = checkpoint(block, x, use_reentrant=False, context_fn=checkpoint_contexts)
        y.sum().backward(retain_graph=True)
        y.sum().backward()  # recomputes once more
        assert load.counts[NAMES[0]].sum() == 12 * 3
    checkpoint(block, x, use_reentrant=False).sum().backward()  # unwatched, nothing to tell


def test_a_copy_is_neither_watched_nor_forced():
    model = tiny_model()
    record, _ = record_of(model)
    with ExpertLoad(model) as load, replay_routing(model, record):
        copied = copy.deepcopy(model)
        copied(tokens(1, 4))
        assert load.counts == {}
        assert not any(router.observed for router in routers(copied).values())
    assert copied.state_dict().keys() == model.state_dict().keys()


def test_bad_records_are_refused_before_anything_is_forced():
    model = tiny_model()
    record, _ = record_of(model)

    def changed(change):
        return {n: [change(i.clone()) for i in calls] for n, calls in record.indices.items()}

    def far(indices):
        indices[5, 1] = 8
        return indices

    def negative(indices):
        indices[0, 0] = -1
        return indices

    refused = [
        (changed(far), r"mixer.gate: recorded indices reach from 0 to 8, the experts from 0 to 7"),
        (changed(negative), r"reach from -1 to 7"),
        (changed(lambda i: i[:, :2]), r"int64 \(32, 2\), the router chooses torch.int64"),
        (changed(lambda i: i.int()), r"are torch.int32 \(32, 3\)"),
        ({NAMES[0]: record.indices[NAMES[0]]}, "no record of .*layers.6"),
        (
            record.indices | {"model.layers.9.gate": []},
            r"no router named \['model.layers.9.gate'\]",
        ),
    ]
    for indices, message in refused:
        with pytest.raises(ValueError, match=message), replay_routing(model, indices):
            pass
        assert not any(router.observed for router in routers(model).values())
    with replay_routing(model, record):
        with pytest.raises(ValueError, match="recorded with 32 tokens and is replayed with 40"):
            model(IDS)
        model(IDS, MASK)
        with pytest.raises(ValueError, match="all 1 recorded calls have been replayed"):
            model(IDS, MASK)
    with pytest.raises(ValueError, match="NemotronV3ForCausalLM without mixture-of-experts"):
        routers(tiny_model("M*-"))


@pytest.mark.skipif(torch.cuda.is_available(), reason="the kernels run in Triton's interpreter")
def test_a_compiled_block_is_watched_as_an_eager_one():
    """`fullgraph=True`: counts, the balance loss and its gradient; the portable experts read sizes
    back, which no graph holds, so the kernels."""
    pytest.importorskip("triton")
    config = {"n_routed_experts": 8, "n_activated_experts": 2, "moe_inter_dim": 16}
    config |= {"dim": 16, "shared_expert_inter_dim": 16}
    layer = NemotronV3MoE(config, backend=BackendConfig(impl="triton"))
    x, layout = torch.randn(9, 16), SequenceLayout.from_lengths([4, 5])
    torch._dynamo.reset()
    found = []
    for run in (layer, torch.compile(layer, backend="aot_eager", fullgraph=True)):
        with ExpertLoad(layer, scores=True) as load, BalanceLoss(layer, 0.1) as balance:
            y = run(x, layout=layout)
            loss = y.square().sum() + balance.take()
        gradients = torch.autograd.grad(loss, list(layer.parameters()))
        metrics = load.metrics()["gate"]
        found.append([y, loss, metrics.share, metrics.score_entropy, *gradients])
    assert all(torch.equal(a, b) for a, b in zip(*found, strict=True))


def test_a_balance_loss_under_checkpoints_has_the_same_gradients():
    seen = []
    for make in (lambda m: m, checkpointed):
        model = make(tiny_model())
        with BalanceLoss(model, 0.1) as balance:
            loss = model(IDS, MASK, labels=LABELS).loss + balance.take()
        loss.backward()
        assert balance.take() == 0.0
        seen.append([loss, *(p.grad for p in model.parameters())])
    assert all(torch.equal(a, b) for a, b in zip(*seen, strict=True))


def test_counts_and_records_of_inference_serve_training():
    model, ids = tiny_model(), tokens(1, 6)
    with ExpertLoad(model, training_only=False) as load, record_routing(model) as record:
        with torch.inference_mode():
            model.eval()(ids)
        counted = {name: counts.clone() for name, counts in load.counts.items()}
        with replay_routing(model, record.indices.copy()):
            pass
    model.train()
    with ExpertLoad(model) as load, replay_routing(model, record):
        model(ids, labels=ids).loss.backward()
    assert all(torch.equal(load.counts[name], counted[name]) for name in counted)
