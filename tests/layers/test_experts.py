"""Low-rank updates on a layer's experts: trained, merged and unmerged exactly, and left behind."""

import copy

import pytest
import torch

from nemotron_v3 import report
from nemotron_v3.checkpoint import CheckpointError, from_pretrained, save_pretrained
from nemotron_v3.layers import NemotronV3Experts
from nemotron_v3.layers.moe import experts as experts_module
from tests.accuracy import relative_error
from tests.models import tiny_model, tokens


def experts_of(model) -> list[NemotronV3Experts]:
    return [m for m in model.modules() if isinstance(m, NemotronV3Experts)]


def adapted(dtype=torch.float32, trained: bool = True):
    """A frozen model whose experts have updates of rank 3, with values where `trained`."""
    model = tiny_model().to(dtype).requires_grad_(False)
    generator = torch.Generator().manual_seed(0)
    for experts in experts_of(model):
        low = experts.add_low_rank(3, alpha=6.0)
        assert low.scale == 2.0 and low.up_a.requires_grad
        if trained:
            with torch.no_grad():
                for b in (low.up_b, low.down_b):
                    b.copy_(torch.randn(b.shape, generator=generator) * 0.1)
    return model


def logits(model):
    return model(tokens(2, 20)).logits.detach()


def stacks(model) -> list[torch.Tensor]:
    names = experts_module.STACKS
    return [getattr(e, n).detach().clone() for e in experts_of(model) for n in names]


def same(first, second) -> bool:
    return all(torch.equal(a, b) for a, b in zip(first, second, strict=True))


def test_a_fresh_update_changes_nothing_and_a_trained_one_does():
    plain = logits(tiny_model())
    torch.testing.assert_close(logits(adapted(trained=False)), plain)
    assert relative_error(logits(adapted()), plain) > 1e-3


def test_only_the_updates_are_trained_and_the_loss_falls():
    """By the documented recipe: frozen model, updates of the experts."""
    model = adapted(trained=False)
    before, ids = stacks(model), tokens(2, 20)
    parameters = [p for p in model.parameters() if p.requires_grad]
    assert len(parameters) == 4 * len(experts_of(model))
    optimizer = torch.optim.AdamW(parameters, lr=1e-2)
    losses = []
    for _ in range(8):
        loss = model(ids, labels=ids).loss
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        losses.append(float(loss.detach()))
    assert losses[-1] < losses[0] - 1e-3
    assert same(stacks(model), before)
    assert all(p.grad is None for p in model.parameters() if not p.requires_grad)


@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16], ids=str)
def test_a_merge_gives_the_same_output_and_is_undone_bit_for_bit(dtype):
    model = adapted(dtype)
    beside, before = logits(model), stacks(model)
    for experts in experts_of(model):
        experts.merge_low_rank(keep_on="cpu")
        assert experts.low_rank.merged and experts.op == "experts"
    assert relative_error(logits(model), beside) < (1e-12 if dtype == torch.float64 else 3e-2)
    assert not any(torch.equal(a, b) for a, b in zip(stacks(model), before, strict=True))
    for experts in experts_of(model):
        experts.unmerge_low_rank()
    assert same(stacks(model), before) and torch.equal(logits(model), beside)


def test_a_merge_that_fails_half_way_changes_nothing(monkeypatch):
    """The last product of the second stack runs out of memory."""
    model = adapted()
    experts, before = experts_of(model)[0], stacks(model)
    calls, addmm = [], torch.addmm

    def failing(*args, **kwargs):
        calls.append(1)
        if len(calls) == 2 * experts.up_proj.shape[0]:
            raise torch.OutOfMemoryError("planted")
        return addmm(*args, **kwargs)

    monkeypatch.setattr(torch, "addmm", failing)
    with pytest.raises(torch.OutOfMemoryError, match="planted"):
        experts.merge_low_rank()
    assert same(stacks(model), before) and not experts.low_rank.merged


def test_stacks_changed_after_a_merge_are_not_thrown_away():
    experts = experts_of(adapted())[0]
    experts.merge_low_rank()
    with torch.no_grad():
        experts.down_proj.add_(1.0)
    changed = experts.down_proj.clone()
    with pytest.raises(RuntimeError, match="down_proj or its update was changed"):
        experts.unmerge_low_rank()
    assert torch.equal(experts.down_proj, changed) and experts.low_rank.merged
    experts.remove_low_rank()
    assert torch.equal(experts.down_proj, changed) and experts.op == "experts"


def test_a_copy_of_a_merged_module_unmerges_too():
    experts = experts_of(adapted())[0]
    before = experts.down_proj.detach().clone()
    experts.merge_low_rank()
    copied = copy.deepcopy(experts)
    copied.unmerge_low_rank()
    assert torch.equal(copied.down_proj, before) and not torch.equal(experts.down_proj, before)
    with pytest.raises(ValueError, match="not of one merge"):
        copy.deepcopy(experts).double().unmerge_low_rank()


def test_checkpoints_hold_no_update_by_accident(tmp_path):
    """Neither beside the stacks nor twice; removed after a merge, the sum is saved."""
    model = adapted()
    merged = copy.deepcopy(model)
    with pytest.raises(CheckpointError, match="merge or remove adapters first"):
        save_pretrained(model, tmp_path / "beside")
    for experts in experts_of(merged):
        experts.merge_low_rank()
    with pytest.raises(RuntimeError, match="hold the merged updates twice"):
        merged.state_dict()
    for experts in experts_of(merged):
        experts.remove_low_rank()
    save_pretrained(merged, tmp_path / "merged")
    loaded = from_pretrained(tmp_path / "merged")
    assert same(stacks(loaded), stacks(merged))
    names = [name for name in model.state_dict() if ".low_rank." in name]
    assert len(names) == 4 * len(experts_of(model))
    other = adapted(trained=False)
    other.load_state_dict(model.state_dict())
    assert torch.equal(logits(other), logits(model))


def test_generation_and_the_report_see_the_updates():
    """The short decode step knows plain experts alone, so it steps aside."""
    options = {"max_new_tokens": 4, "do_sample": False, "eos_token_id": [], "return_logprobs": True}

    def generated(model):
        return model.generate(tokens(1, 6), **options).logprobs

    model = adapted(torch.float64)
    beside = generated(model)
    assert {row.computes for row in report(experts_of(model)[0]).rows} == {"grouped_low_rank"}
    for experts in experts_of(model):
        experts.merge_low_rank()
    assert {row.computes for row in report(experts_of(model)[0]).rows} == {"experts"}
    torch.testing.assert_close(generated(model), beside)
    assert relative_error(generated(tiny_model().double()), beside) > 1e-4


def test_drawing_anew_leaves_updates_of_nothing():
    model = adapted()
    for block in model.model.layers:
        if block.mlp is not None:
            block.mlp.init_weights(4)
            assert not block.mlp.experts.low_rank.up_b.any()
            assert block.mlp.experts.low_rank.up_a.std() > 0


def test_misuse_is_refused():
    experts = experts_of(tiny_model())[0]
    with pytest.raises(ValueError, match="rank must be at least 1, got 0"):
        experts.add_low_rank(0)
    for call in (experts.merge_low_rank, experts.unmerge_low_rank, experts.remove_low_rank):
        with pytest.raises(ValueError, match="no low-rank update"):
            call()
    experts.add_low_rank(2)
    with pytest.raises(ValueError, match="already"):
        experts.add_low_rank(2)
    with pytest.raises(ValueError, match="not merged"):
        experts.unmerge_low_rank()
    experts.merge_low_rank()
    with pytest.raises(ValueError, match="merged already"):
        experts.merge_low_rank()
