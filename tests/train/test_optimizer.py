"""AdamW on weights of both dtypes."""

from dataclasses import replace

import pytest
import torch
from torch import nn

from nemotron_v3.train import update
from nemotron_v3.train.eight_bit import EightBitAdamW, block_of
from nemotron_v3.train.optimizer import RoundedAdamW
from nemotron_v3.train.optimizers import make_optimizer
from nemotron_v3.train.options import OptimizerOptions
from tests.accuracy import relative_error
from tests.models import tiny_model, tokens

OPTIONS = OptimizerOptions(learning_rate=1e-2, weight_decay=0.1)


def models(dtype: torch.dtype) -> nn.Module:
    return tiny_model("M*E", dtype=dtype)


def one_step(model: nn.Module, optimizer: torch.optim.Optimizer, seed: int = 0) -> float:
    ids = tokens(2, 20, seed=seed)
    loss = model(ids, labels=ids).loss
    loss.backward()
    optimizer.step()
    optimizer.zero_grad()
    return loss.item()


def test_weights_in_fp32_have_pytorchs_own():
    optimizer = make_optimizer(models(torch.float32), OPTIONS, 0)
    assert type(optimizer) is torch.optim.AdamW
    decays = [group["weight_decay"] for group in optimizer.param_groups]
    assert decays == [0.1, 0.0] and all(g["fused"] for g in optimizer.param_groups)


@pytest.mark.parametrize("rounding", ["stochastic", "master", "nearest"])
def test_an_update_of_bf16_weights_is_pytorchs_in_fp32_then_rounded(rounding):
    model = models(torch.bfloat16)
    before = {name: p.detach().float() for name, p in model.named_parameters()}
    optimizer = make_optimizer(model, replace(OPTIONS, bf16_weights=rounding), 0)
    assert type(optimizer) is RoundedAdamW
    ids = tokens(2, 20)
    model(ids, labels=ids).loss.backward()
    wide = {n: nn.Parameter(before[n].clone()) for n in before}
    for name, p in model.named_parameters():
        wide[name].grad = p.grad.float()
    groups = [
        {"params": [wide[n] for p in g["params"] for n, q in model.named_parameters() if q is p]}
        | {"weight_decay": g["weight_decay"]}
        for g in optimizer.param_groups
    ]
    truth = torch.optim.AdamW(groups, lr=1e-2, betas=OPTIONS.betas, fused=True)
    optimizer.step()
    truth.step()
    for name, p in model.named_parameters():
        if p.dtype != torch.bfloat16:
            assert torch.equal(p, wide[name])
        elif rounding == "stochastic":
            bits = (p.float() - wide[name]).abs()
            assert (bits <= torch.finfo(torch.bfloat16).eps * wide[name].abs()).all()
            assert not torch.equal(p, wide[name].bfloat16()) or p.numel() < 64
        else:
            assert torch.equal(p, wide[name].bfloat16())
        if rounding == "master" and p.dtype == torch.bfloat16:
            assert torch.equal(optimizer.state[p]["master"], wide[name])


@pytest.mark.parametrize("rounding", ["stochastic", "master", "nearest"])
def test_the_pass_of_a_gpu_makes_the_update_of_the_others(rounding, monkeypatch):
    """Not compiled here; over three steps, of chunks, with gradients that are shortened."""
    monkeypatch.setattr(update, "CHUNK", 100)
    made, gradients = [], []
    for by_pass in (False, True):
        model = models(torch.bfloat16)
        optimizer = make_optimizer(model, replace(OPTIONS, bf16_weights=rounding), 0)
        optimizer.scale = 0.25
        if by_pass:
            optimizer._update = optimizer._update_on_gpu
        for seed in range(3):
            torch.manual_seed(seed)
            for p in model.parameters():
                p.grad = torch.randn_like(p)
            gradients.append([p.grad for p in model.parameters()])
            versions = [p._version for p in model.parameters()]
            optimizer.step()
            moved = zip(versions, model.parameters(), strict=True)
            assert not by_pass or all(p._version > version for version, p in moved)
        made.append((model, optimizer))
    (first, one), (second, other) = made
    true = [nn.Parameter(p.detach().double()) for p in models(torch.bfloat16).parameters()]
    decays = {p: g["weight_decay"] for g in one.param_groups for p in g["params"]}
    groups = [
        {"params": [t], "weight_decay": decays[p]}
        for t, p in zip(true, first.parameters(), strict=True)
    ]
    exact = torch.optim.AdamW(groups, lr=1e-2, betas=OPTIONS.betas)
    for each in gradients[:3]:
        for t, gradient in zip(true, each, strict=True):
            t.grad = 0.25 * gradient.double()
        exact.step()
    for p, q, t in zip(first.parameters(), second.parameters(), true, strict=True):
        state, same = one.state[p], other.state[q]
        assert state.keys() == same.keys() and state["step"] == same["step"] == 3
        exact.state[t]["master"] = t
        for name in state.keys() - {"step", "count"}:
            errors = [relative_error(s[name], exact.state[t][name]) for s in (same, state)]
            assert errors[0] <= 2 * errors[1] + torch.finfo(torch.float32).eps / 2, name
        torch.testing.assert_close(p, q)
    pairs = zip(first.parameters(), second.parameters(), strict=True)
    apart = torch.cat([(p != q).flatten() for p, q in pairs if p.dtype == torch.bfloat16])
    assert apart.float().mean() < 1e-3  # on the other side of a rounding


def test_frozen_parameters_have_no_state():
    model = models(torch.bfloat16)
    model.model.embeddings.weight.requires_grad_(False)
    optimizer = make_optimizer(model, OPTIONS, 0)
    one_step(model, optimizer)
    assert model.model.embeddings.weight not in optimizer.state


@pytest.mark.integration
def test_300_steps_of_bf16_weights_end_where_fp32_does():
    """Within 0.5 % of fp32's loss, where rounding to the nearest is further away."""
    ends = {}
    for name, dtype, rounding in (
        ("fp32", torch.float32, "stochastic"),
        ("stochastic", torch.bfloat16, "stochastic"),
        ("nearest", torch.bfloat16, "nearest"),
    ):
        model = models(dtype)
        options = replace(OPTIONS, learning_rate=2e-4, bf16_weights=rounding)
        optimizer = make_optimizer(model, options, 0)
        losses = [one_step(model, optimizer, seed=i % 8) for i in range(300)]
        ends[name] = sum(losses[-8:]) / 8
    print(ends)
    away = {n: abs(ends[n] / ends["fp32"] - 1) for n in ("stochastic", "nearest")}
    assert away["stochastic"] <= 0.005 < away["nearest"], ends


@pytest.mark.integration
def test_moments_of_8_bits_learn_as_those_of_32(monkeypatch):
    pytest.importorskip("torchao")
    ends = {}
    for moments in ("float32", "8bit"):
        model = models(torch.float32)
        optimizer = make_optimizer(model, replace(OPTIONS, moments=moments), 0)
        losses = [one_step(model, optimizer, seed=i % 4) for i in range(30)]
        ends[moments] = losses[-1]
    assert ends["8bit"] == pytest.approx(ends["float32"], rel=0.05)


def test_8_bits_and_masters_contradict_each_other():
    pytest.importorskip("torchao")
    options = replace(OPTIONS, moments="8bit", bf16_weights="master")
    with pytest.raises(ValueError, match="give bf16_weights = 'stochastic'"):
        make_optimizer(models(torch.bfloat16), options, 0)


def test_moments_of_8_bits_lie_in_rows():
    """Each block has its own scale: what a row's moments are depends on no other row."""
    pytest.importorskip("torchao")
    shapes = {"stack": (4, 24, 64), "matrix": (40, 128), "odd": (64, 67), "vector": (8192,)}
    blocks = {"stack": 64, "matrix": 128, "odd": None, "vector": None}
    assert {name: block_of(shape) for name, shape in shapes.items()} == blocks
    generator = torch.Generator().manual_seed(0)
    values = {n: torch.randn(s, generator=generator) for n, s in shapes.items()}
    slopes = {n: torch.randn(s, generator=generator) for n, s in shapes.items()}

    def updated(part: slice) -> torch.Tensor:
        weight = nn.Parameter(values["stack"][part].clone())
        kind = {"lr": 1e-2, "betas": (0.9, 0.95), "eps": 1e-8, "rounding": "nearest"}
        optimizer = EightBitAdamW([weight], **kind, names={weight: "w"})
        for _ in range(3):
            weight.grad = slopes["stack"][part].clone()
            optimizer.step()
        assert optimizer.state[weight]["exp_avg"].dtype == torch.uint8
        return weight.detach()

    assert torch.equal(updated(slice(None))[:3], updated(slice(0, 3)))


def test_a_step_with_moments_of_8_bits_is_adamws():
    """Its first step is exact where the moments are 0 before; later ones are within the codes."""
    pytest.importorskip("torchao")
    generator = torch.Generator().manual_seed(0)
    start = torch.randn(64, 256, generator=generator)
    narrow, wide = nn.Parameter(start.clone()), nn.Parameter(start.clone())
    kind = {"lr": 1e-2, "betas": (0.9, 0.95), "eps": 1e-8}
    ours = EightBitAdamW([narrow], **kind, rounding="nearest", names={narrow: "w"})
    ours.param_groups[0]["weight_decay"] = 0.1
    truth = torch.optim.AdamW([wide], **kind, weight_decay=0.1)
    for number in range(10):
        slope = torch.randn(64, 256, generator=generator)
        narrow.grad, wide.grad = slope.clone(), slope.clone()
        ours.step()
        truth.step()
        away = (narrow - wide).norm() / (wide - start).norm()
        assert away <= (1e-5 if not number else 0.05)
