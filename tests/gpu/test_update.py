"""The optimiser's compiled pass on a GPU beside PyTorch's update of widened weights."""

import pytest
import torch
from torch import nn

from nemotron_v3.train.optimizer import RoundedAdamW
from tests.accuracy import relative_error

pytestmark = [
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU"),
    pytest.mark.heavy,
]

SHAPES = [(8, 48, 33), (300, 70), (257,), (1,)]


def made(rounding: str) -> RoundedAdamW:
    torch.manual_seed(0)
    weights = [nn.Parameter(torch.randn(s).bfloat16().cuda()) for s in SHAPES]
    names = {p: str(i) for i, p in enumerate(weights)}
    settings = {"lr": 1e-2, "betas": (0.9, 0.95), "eps": 1e-8}
    optimizer = RoundedAdamW(weights, **settings, rounding=rounding, names=names)
    optimizer.scale = 0.5
    return optimizer


def step(optimizer: RoundedAdamW, seed: int) -> None:
    torch.manual_seed(seed)
    for p in optimizer.param_groups[0]["params"]:
        p.grad = torch.randn(p.shape).bfloat16().cuda()
    optimizer.step()


@pytest.mark.parametrize("rounding", ["stochastic", "master", "nearest"])
def test_both_ways_make_the_same_weights(rounding):
    ours, theirs = made(rounding), made(rounding)
    theirs._update = theirs._update_widened
    for seed in range(3):
        step(ours, seed)
        step(theirs, seed)
    apart = []
    for p, q in zip(*(o.param_groups[0]["params"] for o in (ours, theirs)), strict=True):
        for name in ours.state[p].keys() - {"step", "count"}:
            assert relative_error(ours.state[p][name], theirs.state[q][name]) < 1e-6, name
        torch.testing.assert_close(p, q)
        apart.append((p != q).flatten())
    assert torch.cat(apart).float().mean() < 1e-3  # on the other side of a rounding


def test_a_step_waits_for_nothing():
    optimizer = made("stochastic")
    step(optimizer, 0)
    torch.cuda.set_sync_debug_mode("error")
    try:
        optimizer.step()
    finally:
        torch.cuda.set_sync_debug_mode("default")
