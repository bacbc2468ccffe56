"""Loads, the moved bias and the auxiliary loss against their formulas, without a host sync."""

import math

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

from nemotron_v3.layers.moe.load_balancing import (
    BalanceLoss,
    ExpertLoad,
    balance_,
    sequence_balance,
)
from nemotron_v3.layers.moe.router import routers
from nemotron_v3.layers.moe.routing_replay import record_routing
from nemotron_v3.layout import SequenceLayout
from tests.models import tiny_model, tokens

IDS, MASK = tokens(2, 20), torch.ones(2, 20)
MASK[1, 12:] = 0
FIRST = "model.layers.1.mixer.gate"


def biases(model):
    return {n: r.e_score_correction_bias.clone() for n, r in routers(model).items()}


def test_counts_add_up_over_passes_and_leave_padding_out():
    model = tiny_model()
    with ExpertLoad(model) as load, record_routing(model) as record:
        model(IDS, MASK)
        model(IDS)
        model.eval()(IDS)
    model.train()(IDS)  # after it was closed
    for name, calls in record.indices.items():
        expected = torch.bincount(torch.cat(calls[:2]).flatten(), minlength=8)
        assert torch.equal(load.counts[name], expected)
        assert expected.sum() == (32 + 40) * 3


def test_metrics_are_those_of_the_counts():
    model = tiny_model()
    load = ExpertLoad(model, scores=True, training_only=False)
    assert load.metrics() == {}
    with record_routing(model) as record:
        model.eval()(IDS)
    load.close()
    for name, metrics in load.metrics().items():
        counts = torch.bincount(record.indices[name][0].flatten(), minlength=8)
        share = counts / counts.sum()
        torch.testing.assert_close(metrics.share, share)
        entropy = -sum(float(p) * math.log(p) for p in share if p > 0) / math.log(8)
        assert float(metrics.entropy) == pytest.approx(entropy, rel=1e-5)
        assert float(metrics.max_violation) == pytest.approx(float(counts.max()) / 15 - 1, rel=1e-5)
        assert int(metrics.idle) == int((counts == 0).sum())
        assert 0 < float(metrics.score_entropy) <= 1
    load.reset()
    assert not any(c.any() for c in load.counts.values())
    assert all(float(m.entropy) == float(m.score_entropy) == 0 for m in load.metrics().values())


def test_the_entropy_of_even_scores_is_one():
    model = tiny_model()
    with torch.no_grad():
        for router in routers(model).values():
            router.weight.zero_()
    with ExpertLoad(model, scores=True) as load:
        model(IDS)
    metrics = load.metrics()[FIRST]
    assert float(metrics.score_entropy) == pytest.approx(1, rel=1e-6)
    # All tokens went to the same three.
    assert float(metrics.entropy) == pytest.approx(math.log(3) / math.log(8), rel=1e-6)
    assert float(metrics.max_violation) == pytest.approx(8 / 3 - 1, rel=1e-6)
    assert int(metrics.idle) == 5


class NoReadingBack(TorchDispatchMode):
    """Raises where an operation would have to wait for the device."""

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        name = func.overloadpacket.__name__
        assert name not in ("_local_scalar_dense", "item", "nonzero", "bincount", "is_nonzero"), (
            name
        )
        return func(*args, **(kwargs or {}))


def test_nothing_is_read_back_from_the_device():
    model = tiny_model()
    gate, x = model.model.layers[1].mixer.gate, torch.randn(9, 48)
    layout = SequenceLayout.from_lengths([4, 0, 5])
    with ExpertLoad(gate, scores=True) as load, BalanceLoss(gate, 0.1) as balance:
        gate(x, layout)
        with NoReadingBack():
            gate(x, layout)
            load.metrics()
            balance.take()
            balance_(load, 1e-3)


def test_the_bias_moves_by_the_sign_rule_after_accumulated_passes():
    model, load = (model := tiny_model()), ExpertLoad(model)
    before = biases(model)
    for part in IDS.split(1):
        model(part, labels=part).loss.backward()
    counts = {n: c.clone() for n, c in load.counts.items()}
    balance_(load, 0.01)
    for name, bias in biases(model).items():
        even = counts[name].float().mean()
        expected = before[name] + 0.01 * torch.sign(even - counts[name])
        torch.testing.assert_close(bias, expected, rtol=0, atol=1e-7)
        assert (bias != before[name]).any() and bias.dtype == torch.float32
    assert not any(c.any() for c in load.counts.values())
    after = biases(model)
    balance_(load, 0.01)  # no token since: nothing moves
    assert all(torch.equal(bias, after[name]) for name, bias in biases(model).items())


def test_an_even_load_moves_nothing_and_a_frozen_model_neither():
    model = tiny_model()
    load = ExpertLoad(model)
    before = biases(model)
    model(IDS)
    for counts in load.counts.values():
        counts.fill_(2**53 // 8)  # where a mean in floating point would be off
    balance_(load, 0.5)
    model(IDS)
    balance_(load, 0.0)
    assert all(torch.equal(b, before[n]) for n, b in biases(model).items())


@pytest.mark.parametrize("in_place", [True, False])
def test_counts_are_added_over_processes_by_one_call(in_place):
    """Two processes, of which this is one: the other's counts come in through `reduce`."""
    model = tiny_model()
    load = ExpertLoad(model)
    model(IDS)
    mine = {n: c.clone() for n, c in load.counts.items()}
    others = torch.arange(16) ** 2
    before, calls = biases(model), []

    def reduce(counts):
        calls.append(counts.clone())
        if in_place:
            counts.add_(others)
            return None
        return counts + others

    balance_(load, 0.01, reduce=reduce)
    assert len(calls) == 1 and torch.equal(calls[0], torch.cat(list(mine.values())))
    for (name, bias), other in zip(biases(model).items(), others.split(8), strict=True):
        total = (mine[name] + other).float()
        expected = before[name] + 0.01 * torch.sign(total.mean() - total)
        torch.testing.assert_close(bias, expected, rtol=0, atol=1e-7)


def test_updates_even_out_the_load():
    model = tiny_model().eval()
    ids = tokens(8, 64)
    with torch.no_grad():
        for router in routers(model).values():
            router.e_score_correction_bias.copy_(torch.linspace(-0.5, 0.5, 8))
    load = ExpertLoad(model, training_only=False)
    violations = []
    with torch.no_grad():
        for step in range(120):
            model(ids)
            violations.append(max(float(m.max_violation) for m in load.metrics().values()))
            balance_(load, 0.02 if step < 80 else 0.002)
    assert violations[0] > 1 and violations[-1] < 0.15


def balance_by_hand(scores, indices, lengths):
    """Equations 17 to 20 of arXiv 2412.19437, one document and expert at a time."""
    (E, K), losses = (scores.shape[1], indices.shape[1]), []
    for s, chosen in zip(scores.split(lengths), indices.split(lengths), strict=True):
        if len(s) == 0:
            continue
        total = 0.0
        for e in range(E):
            f = E / (K * len(s)) * float((chosen == e).sum())
            total = total + f * (s[:, e] / s.sum(1)).mean()
        losses.append(total)
    return sum(losses) / len(losses)


def test_the_balance_loss_is_the_papers():
    lengths = [5, 0, 1, 9]
    scores = torch.rand(15, 8, dtype=torch.float64, requires_grad=True)
    indices = torch.rand(15, 8).topk(3).indices
    ours = sequence_balance(scores, indices, SequenceLayout.from_lengths(lengths))
    true = balance_by_hand(scores, indices, lengths)
    torch.testing.assert_close(ours, true, rtol=1e-12, atol=0)
    a, b = (torch.autograd.grad(x, scores)[0] for x in (ours, true))
    torch.testing.assert_close(a, b, rtol=1e-12, atol=1e-18)
    even = sequence_balance(torch.ones(15, 8), indices, None)
    torch.testing.assert_close(even, torch.tensor(1.0))


def test_the_balance_loss_of_a_model_reaches_every_router():
    """A padded batch and its pack, by hand from the recorded choices."""
    model = tiny_model().double()
    xs = {}
    for name, router in routers(model).items():
        router.register_forward_pre_hook(lambda m, args, name=name: xs.__setitem__(name, args[0]))
    with BalanceLoss(model, 0.25) as balance, record_routing(model) as record:
        model(IDS, MASK)
        loss = balance.take()
    expected = sum(
        0.25 * balance_by_hand(router.scores(xs[name]), record.indices[name][0], [20, 12])
        for name, router in routers(model).items()
    )
    torch.testing.assert_close(loss, expected, rtol=1e-12, atol=0)
    weights = [router.weight for router in routers(model).values()]
    measured = torch.autograd.grad(loss, weights, retain_graph=True)
    for a, b in zip(measured, torch.autograd.grad(expected, weights), strict=True):
        torch.testing.assert_close(a, b, rtol=1e-9, atol=1e-15)
        assert a.abs().max() > 0


def test_the_balance_loss_evens_out_a_router():
    model = tiny_model()
    mixer = model.model.layers[1].mixer
    with torch.no_grad():
        mixer.gate.e_score_correction_bias.zero_()
        mixer.gate.weight[0] += 0.1
    x = torch.randn(256, 48) + 0.3
    optimizer = torch.optim.SGD([mixer.gate.weight], lr=5.0)
    spread = []
    with BalanceLoss(mixer, 1.0) as balance, ExpertLoad(mixer) as load:
        for _ in range(30):
            optimizer.zero_grad()
            mixer.gate(x)
            spread.append(float(load.metrics()["gate"].max_violation))
            load.reset()
            balance.take().backward()
            optimizer.step()
    assert spread[-1] < 0.2 * spread[0], spread


def test_an_evaluation_has_no_balance_loss():
    model = tiny_model()
    with BalanceLoss(model, 0.1) as balance:
        with torch.no_grad():
            model(IDS)
        model.eval()(IDS)
        assert balance.take() == 0.0


def test_bad_rates_and_counts_of_nothing_are_refused():
    model = tiny_model()
    with pytest.raises(ValueError, match="got -0.1"):
        BalanceLoss(model, -0.1)
    load = ExpertLoad(model)
    with pytest.raises(RuntimeError, match="no token was counted"):
        balance_(load, 0.1)
    with pytest.raises(ValueError, match="got nan"):
        balance_(load, math.nan)
    with pytest.raises(ValueError, match="without mixture-of-experts blocks"):
        ExpertLoad(tiny_model("M*-"))


def test_parts_of_a_batch_add_up_to_the_whole():
    """Gradient accumulation over parts with different numbers of documents and targets."""
    model = tiny_model().double().train()
    parts = [tokens(1, 5), tokens(3, 30, seed=1)]
    flat = torch.cat([part.flatten() for part in parts])
    layout, targets, documents = SequenceLayout.from_lengths([5, 30, 30, 30]), 4 + 3 * 29, 4
    found = []
    with BalanceLoss(model, 0.1) as balance:
        whole = model(flat, labels=flat, layout=layout).loss + balance.take()
        found.append(torch.autograd.grad(whole, list(model.parameters())))
        for part in parts:
            loss = model(part, labels=part, num_items_in_batch=targets).loss
            (loss + balance.take() * len(part) / documents).backward()
    found.append([p.grad for p in model.parameters()])
    for a, b in zip(*found, strict=True):
        assert (a - b).abs().max() <= 1e-10 * a.abs().max()
