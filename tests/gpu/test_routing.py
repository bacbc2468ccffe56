"""Routing on a GPU: nothing waits for the host, a captured step counts, low-rank products."""

from functools import partial

import pytest
import torch

from nemotron_v3 import SequenceLayout, ops
from nemotron_v3.layers import BalanceLoss, ExpertLoad, NemotronV3MoE, balance_
from nemotron_v3.ops.grouped_low_rank import cases, reference
from tests.accuracy import PlainPyTorch, check

pytestmark = [
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU"),
    pytest.mark.heavy,
]

BF16 = torch.bfloat16
CONFIG = {
    "dim": 256,
    "n_routed_experts": 16,
    "n_activated_experts": 4,
    "moe_inter_dim": 128,
    "shared_expert_inter_dim": 128,
}


def drawn():
    torch.manual_seed(0)
    layer = NemotronV3MoE(CONFIG, dtype=BF16).cuda()
    x = torch.randn(300, 256, device="cuda", dtype=BF16, requires_grad=True)
    layout = SequenceLayout.from_lengths([100, 0, 200], "cuda")
    return layer, x, layout


def test_a_watched_step_waits_for_nothing():
    layer, x, layout = drawn()
    with ExpertLoad(layer, scores=True) as load, BalanceLoss(layer, 0.1) as balance:

        def step():
            y = layer(x, layout=layout)
            (y.float().square().mean() + balance.take()).backward()
            metrics = load.metrics()
            balance_(load, 1e-3)
            return metrics["gate"]

        step()
        torch.cuda.set_sync_debug_mode("error")
        try:
            metrics = step()
        finally:
            torch.cuda.set_sync_debug_mode("default")
    assert float(metrics.share.sum()) == pytest.approx(1)
    assert layer.gate.weight.grad.abs().sum() > 0
    assert layer.gate.e_score_correction_bias.abs().max() > 0


def test_a_captured_step_goes_on_counting():
    layer, x, layout = drawn()
    with ExpertLoad(layer) as load, torch.no_grad():
        layer(x, layout=layout)
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            y = layer(x, layout=layout)
        load.reset()
        for _ in range(3):
            graph.replay()
        counts = load.counts["gate"].clone()
        load.reset()
        assert torch.equal(layer(x, layout=layout), y)
    assert torch.equal(counts, 3 * load.counts["gate"]) and int(counts.sum()) == 3 * 300 * 4


@pytest.mark.parametrize(
    "case", [cases.Case("aligned", 200, 64, 48, 16, 3, 8, used=5), cases.CASES[3]]
)
def test_low_rank_updates(case):
    check(
        partial(ops.grouped_low_rank, impl="portable"),
        reference.grouped_low_rank,
        lambda generator: cases.make_inputs(case, BF16, "cuda", generator),
        dtype=BF16,
        plain=PlainPyTorch(reference.grouped_low_rank, BF16, results=True),
    )
