"""What is not a number at padding reaches nothing, also where transformers' model has the grid."""

import pytest
import torch
from transformers import DynamicCache

from tests.hf.models import LATENT, accelerated, gradients, tokens, transformers_model

MASKS = {
    "left": torch.tensor([[0, 0, 0, 1, 1, 1, 1], [1, 1, 1, 1, 1, 1, 1]]),
    "right": torch.tensor([[1, 1, 1, 1, 0, 0, 0], [1, 1, 1, 1, 1, 1, 0]]),
}


def hold(clean: dict[str, torch.Tensor], spoilt: dict[str, torch.Tensor]) -> None:
    assert clean.keys() == spoilt.keys()
    for name, tensor in clean.items():
        assert torch.isfinite(tensor).all(), name
        assert torch.equal(spoilt[name], tensor), name


@pytest.mark.parametrize("value", [float("nan"), float("inf")], ids=str)
@pytest.mark.parametrize("loss", ["logits", "linear"])
@pytest.mark.parametrize("mask", MASKS.values(), ids=MASKS)
def test_training(mask, loss, value):
    model = accelerated(transformers_model(**LATENT), loss=loss).train()
    labels = tokens(2, 7).masked_fill(mask == 0, -100)
    embeds, found = torch.randn(2, 7, 48), []
    for given in (embeds, embeds.masked_fill(mask[..., None] == 0, value)):
        model.zero_grad()
        given.requires_grad_()
        out = model(inputs_embeds=given, attention_mask=mask, labels=labels)
        out.loss.backward()
        logits = {} if out.logits is None else {"logits": out.logits}
        found.append({"loss": out.loss, "x": given.grad} | logits | gradients(model))
    hold(*found)


@pytest.mark.parametrize("mask", MASKS.values(), ids=MASKS)
@torch.no_grad()
def test_a_cache(mask):
    model = accelerated(transformers_model(**LATENT))
    embeds, found = torch.randn(2, 7, 48), []
    for given in (embeds, embeds.masked_fill(mask[..., None] == 0, float("nan"))):
        cache = DynamicCache(config=model.config)
        logits = [model(inputs_embeds=given, attention_mask=mask, past_key_values=cache).logits]
        longer = mask
        for piece in (mask, torch.ones(2, 1, dtype=torch.int64)):
            longer = torch.cat([longer, piece], 1)
            new = given[:, : piece.shape[1]] if piece is mask else model.model.embeddings(piece)
            out = model(inputs_embeds=new, attention_mask=longer, past_key_values=cache)
            logits.append(out.logits)
        found.append({"logits": torch.cat(logits, 1)})
    hold(*found)
