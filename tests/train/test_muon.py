"""Muon: its update beside PyTorch's, on stacks, in bf16, shared by processes, and gone on with."""

from dataclasses import replace

import pytest
import torch
import torch.distributed as dist
from torch import nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.tensor import Replicate, Shard, distribute_tensor

from nemotron_v3.model import cost
from nemotron_v3.model.optim import hidden_matrices
from nemotron_v3.train.memory import _matrix_elements, estimate
from nemotron_v3.train.muon import RMS, Muon, orthogonal, whole_matrices
from nemotron_v3.train.optimizer import make_optimizer
from nemotron_v3.train.options import (
    LoraOptions,
    ModelOptions,
    OptimizerOptions,
    ScheduleOptions,
)
from nemotron_v3.train.run import train
from tests.models import tiny_model, tokens
from tests.train.launch import free_port
from tests.train.test_run import SILENT, Crash, crash_after, losses, same_weights, saved_steps

MUON = OptimizerOptions(kind="muon", learning_rate=1e-2, balance=1e-3)


def with_gradients(dtype: torch.dtype, seed: int = 0) -> nn.Module:
    model = tiny_model("ME*-", dtype=dtype)
    ids = tokens(2, 20, seed=seed)
    model(ids, labels=ids).loss.backward()
    return model


def test_projections_and_experts_are_matrices_and_nothing_else():
    model = tiny_model("ME*-", dtype=torch.float32)
    matrices = set(hidden_matrices(model))
    names = {n for n, p in model.named_parameters() if p in matrices}
    others = {n.rsplit(".", 2)[-2] for n, p in model.named_parameters() if p not in matrices}
    assert {n.rpartition("mixer.")[2].removesuffix(".weight") for n in names} == {
        *("in_proj", "out_proj", "q_proj", "k_proj", "v_proj", "o_proj", "up_proj", "down_proj"),
        *("experts.up_proj", "experts.down_proj"),
        *("shared_experts.up_proj", "shared_experts.down_proj"),
    }
    assert {"embeddings", "lm_head", "gate", "conv1d", "norm", "norm_f", "mixer"} <= others
    counted = sum(map(_matrix_elements, cost.model_weights(model.config)))
    assert counted == sum(p.numel() for p in matrices)


@pytest.mark.parametrize("shape", [(24, 24), (8, 40), (40, 8)])
def test_a_matrix_moves_as_pytorchs_muon_moves_it(shape):
    """Whose products are in bf16: as far from ours as bf16 is from fp32."""
    torch.manual_seed(0)
    ours, theirs = (nn.Parameter(torch.randn(shape)) for _ in range(2))
    theirs.data.copy_(ours.data)
    kind = {"lr": 0.1, "weight_decay": 0.2, "adjust_lr_fn": "match_rms_adamw"}
    truth = torch.optim.Muon([theirs], momentum=0.9, **kind)
    groups = [{"params": [ours], "matrices": True}]
    muon = Muon(
        groups, momentum=0.9, lr=0.1, betas=(0.9, 0.9), eps=1e-8, rounding="nearest", names={}
    )
    muon.param_groups[0]["weight_decay"] = 0.2
    for _ in range(3):
        before = ours.detach().clone()
        ours.grad = torch.randn(shape)
        theirs.grad = ours.grad.clone()
        muon.step()
        truth.step()
        moved = (ours - before).norm()
        assert (ours - theirs).norm() < 0.05 * moved


@pytest.mark.parametrize("shape", [(5, 12, 12), (3, 6, 20), (20, 6)])
def test_singular_values_become_about_one(shape, monkeypatch):
    """Beside a singular value decomposition in fp64, whose values take the polynomial's steps."""
    monkeypatch.setattr("nemotron_v3.train.muon.AT_ONCE", 2 * shape[-1] * shape[-2])
    matrices = torch.randn(shape, generator=torch.Generator().manual_seed(0))
    left, values, right = torch.linalg.svd(matrices.double(), full_matrices=False)
    values = values / values.norm(dim=-1, keepdim=True)
    for _ in range(5):
        values = 3.4445 * values - 4.7750 * values**3 + 2.0315 * values**5
    truth = left @ torch.diag_embed(values) @ right
    torch.testing.assert_close(orthogonal(matrices, torch.float32), truth.float())
    assert values.max() < 1.25 and values.median() > 0.65
    assert torch.equal(orthogonal(torch.zeros(shape), torch.float32), torch.zeros(shape))


def test_a_stack_moves_as_each_of_its_matrices_alone():
    stack = torch.randn(4, 6, 10)
    alone = torch.stack([orthogonal(matrix, torch.float32) for matrix in stack])
    torch.testing.assert_close(orthogonal(stack, torch.float32), alone)


def test_vectors_embeddings_and_routers_have_adamws_update():
    first, second = (with_gradients(torch.float32) for _ in range(2))
    moved = {
        k: make_optimizer(m, replace(MUON, kind=k), 0)
        for k, m in (("muon", first), ("adamw", second))
    }
    assert type(moved["muon"]) is Muon
    for optimizer in moved.values():
        optimizer.step()
    matrices = set(hidden_matrices(first))
    for (name, p), q in zip(first.named_parameters(), second.parameters(), strict=True):
        assert torch.allclose(p, q, rtol=1e-6, atol=1e-7) != (p in matrices), name
    decays = [(g["matrices"], g["weight_decay"]) for g in moved["muon"].param_groups]
    assert decays == [(True, 0.1), (False, 0.1), (False, 0.0)]


@pytest.mark.parametrize("rounding", ["stochastic", "master", "nearest"])
def test_bf16_weights_move_in_fp32_and_are_rounded(rounding):
    model = with_gradients(torch.bfloat16)
    optimizer = make_optimizer(model, replace(MUON, bf16_weights=rounding), 0)
    before = {p: p.detach().float() for p in hidden_matrices(model)}
    gradients = {p: p.grad.float() for p in before}
    optimizer.step()
    for p, weight in before.items():
        update = orthogonal(0.0975 * gradients[p], torch.float32)
        moved = weight * (1 - 1e-3) - 1e-2 * RMS * max(p.shape[-2:]) ** 0.5 * update
        if rounding == "stochastic":
            assert ((p.float() - moved).abs() <= 2**-7 * moved.abs() + 1e-6).all()
        else:
            torch.testing.assert_close(p, moved.bfloat16())
        if rounding == "master":
            torch.testing.assert_close(optimizer.state[p]["master"], moved)
        assert optimizer.state[p].keys() == {"momentum", "count"} | (
            {"master"} if rounding == "master" else set()
        )


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_a_crashed_run_goes_on_to_the_bit(options, tmp_path, base, dtype):
    model = ModelOptions(path=base, dtype=dtype, device="cpu")
    changes = {"model": model, "optimizer": MUON, "schedule": ScheduleOptions(steps=5)}
    whole, asked = options(out=tmp_path / "whole", **changes), options(**changes)
    train(whole, **SILENT)
    with pytest.raises(Crash):
        train(asked, **SILENT, after_step=crash_after(4))
    assert saved_steps(asked.out) == [3]
    with pytest.raises(ValueError, match="optimiser's state"):
        train(replace(asked, optimizer=replace(MUON, kind="adamw")), resume=True, **SILENT)
    train(asked, resume=True, **SILENT)
    assert losses(asked.out) == losses(whole.out)
    assert same_weights(asked.out, whole.out)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"optimizer": replace(MUON, moments="8bit")}, "one moment, in fp32"),
        ({"optimizer": MUON, "lora": LoraOptions(rank=2)}, "factors of updates"),
        ({"optimizer": replace(MUON, momentum=1.0)}, "momentum is 1.0"),
    ],
)
def test_what_it_cannot_be_with_is_refused(options, changes, message):
    asked = options(**changes)
    with pytest.raises(ValueError, match=message):
        train(asked, **SILENT)
    assert not asked.out.exists()


def test_the_plan_counts_one_moment_of_matrices(options):
    for dtype, rounding, each in (
        (torch.float32, "stochastic", 0),
        (torch.bfloat16, "stochastic", 0),
        (torch.bfloat16, "master", 4),
    ):
        model = with_gradients(dtype)
        asked = options(optimizer=replace(MUON, bf16_weights=rounding))
        optimizer = make_optimizer(model, asked.optimizer, 0)
        optimizer.step()
        held = sum(
            t.nbytes
            for state in optimizer.state.values()
            for t in state.values()
            if isinstance(t, torch.Tensor) and t.dim()
        )
        told = estimate(asked, model.config, dtype, 1)
        # What an update needs fits where activations were.
        assert told.optimizer == pytest.approx(held, rel=0.02), (dtype, each)


@pytest.fixture
def mesh(monkeypatch):
    """One process that stands for a group."""
    for name, told in (("RANK", "0"), ("WORLD_SIZE", "1"), ("MASTER_ADDR", "127.0.0.1")):
        monkeypatch.setenv(name, told)
    monkeypatch.setenv("MASTER_PORT", str(free_port()))
    dist.init_process_group("gloo")
    yield init_device_mesh("cpu", (1, 1))
    dist.destroy_process_group()


@pytest.mark.parametrize(
    "how", [(Shard(0), Shard(1)), (Replicate(), Shard(0)), (Shard(0), Replicate())]
)
def test_what_processes_share_is_gathered_where_it_is_within_matrices(mesh, how):
    p = distribute_tensor(torch.randn(4, 6, 10), mesh, how)
    whole, own = whole_matrices(p, p.to_local())
    assert torch.equal(whole, p.to_local()) and whole[own].shape == p.to_local().shape
