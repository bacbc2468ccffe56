"""A batch in which nothing is real: loss 0, and a gradient of zeros for every parameter."""

import pytest
import torch

from nemotron_v3 import BackendConfig, SequenceLayout
from nemotron_v3.layers import BalanceLoss, NemotronV3Experts
from tests.models import tiny_model, tokens

IDS = tokens(2, 5)
NOTHING = {
    "a mask of zeros": (IDS, {"attention_mask": torch.zeros(2, 5)}),
    "padding numbers": (IDS, {"seq_idx": torch.full((2, 5), -1)}),
    "a layout of padding": (IDS, {"layout": SequenceLayout.from_padding_mask(torch.zeros(2, 5))}),
    "empty documents": (
        IDS.flatten(),
        {"cu_seqlens": torch.tensor([0, 0, 0]), "cu_seqlens_padded": torch.tensor([0, 5, 10])},
    ),
    "no token": (IDS.flatten()[:0], {"layout": SequenceLayout.from_lengths([0])}),
    "rows of no token": (IDS[:, :0], {}),
}
MODELS = {
    "plain": {},
    "biases and latent": {
        **{"use_bias": True, "mlp_bias": True, "attention_bias": True},
        "moe_latent_size": 28,
    },
    "tied": {"tie_word_embeddings": True},
    "reference": {"backend": BackendConfig(impl="reference")},
}


def check(model, ids, **said):
    loss = model(ids, labels=ids, **said).loss
    assert loss == 0
    loss.backward()
    trained = {n: p for n, p in model.named_parameters() if p.requires_grad}
    missing = [n for n, p in trained.items() if p.grad is None]
    assert not missing, missing
    assert all(torch.count_nonzero(p.grad) == 0 for p in trained.values())
    assert all(p.grad.shape == p.shape for p in trained.values())


@pytest.mark.parametrize(("ids", "said"), NOTHING.values(), ids=NOTHING)
@pytest.mark.parametrize("changes", MODELS.values(), ids=MODELS)
def test_every_parameter_gets_zeros(changes, ids, said):
    check(tiny_model("ME*-", **changes).train(), ids, **said)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float64])
def test_in_other_dtypes(dtype):
    check(tiny_model("ME*-").to(dtype).train(), IDS, attention_mask=torch.zeros(2, 5))


def test_under_autocast_with_recomputed_blocks():
    model = tiny_model("ME*-").train()
    model.gradient_checkpointing_enable()
    with torch.autocast("cpu", torch.bfloat16):
        check(model, IDS, attention_mask=torch.zeros(2, 5))


@pytest.mark.parametrize("frozen", [False, True])
def test_low_rank_updates_of_the_experts(frozen):
    model = tiny_model("ME*-").train()
    model.requires_grad_(not frozen)
    for experts in model.modules():
        if isinstance(experts, NemotronV3Experts):
            experts.add_low_rank(2)
    check(model, IDS, attention_mask=torch.zeros(2, 5))


def test_idle_experts_get_zeros():
    """One real token has three experts of eight."""
    model = tiny_model("ME*-").train()
    mask = torch.zeros(2, 5)
    mask[0, :2] = 1
    labels = IDS.masked_fill(mask == 0, -100)
    model(IDS, mask, labels=labels).loss.backward()
    assert all(p.grad is not None for p in model.parameters())
    used = model.model.layers[1].mixer.experts.up_proj.grad.flatten(1).abs().amax(1) > 0
    assert 3 <= used.sum() <= 6


def test_a_balance_loss_of_no_token_is_0():
    model = tiny_model("ME*-").train()
    with BalanceLoss(model, 0.1) as balance:
        loss = model(IDS, torch.zeros(2, 5), labels=IDS).loss + balance.take()
    assert loss == 0
    loss.backward()
    assert all(p.grad is not None for p in model.parameters())
