"""Labels of padded batches, empty batches and packs beside a mask, as transformers counts them."""

import pytest
import torch

from nemotron_v3.hf.peft import add_lora
from tests.accuracy import relative_error
from tests.hf.models import (
    LATENT,
    accelerated,
    close,
    documents,
    gradients,
    right_padded,
    tokens,
    transformers_model,
)

BATCH = right_padded(documents([9, 4, 7]))
TARGETS = 8 + 3 + 6
FORMS = ("logits", "linear")


def step(model, **batch):
    model.zero_grad()
    loss = model.train()(**batch).loss
    loss.backward()
    return {"loss": loss.detach()} | gradients(model)


def behind_the_text():
    """The first place of the padding is a target, as an end token that stops generation."""
    labels = BATCH["labels"].clone()
    labels[1, 4], labels[2, 7] = 3, 3
    return BATCH | {"labels": labels}


@pytest.mark.parametrize("items", [None, TARGETS, torch.tensor(50)], ids=str)
@pytest.mark.parametrize("loss", FORMS)
@pytest.mark.parametrize("batch", [BATCH, behind_the_text()], ids=["the text", "and behind it"])
def test_loss_and_gradients_of_a_padded_batch_are_transformers(batch, loss, items):
    """In fp64, where dt is not clamped: the same numbers to the last digits."""
    plain = transformers_model().double()
    plain.set_experts_implementation("eager")  # its grouped product knows no fp64
    batch = batch | ({} if items is None else {"num_items_in_batch": items})
    expected = step(plain, **batch)
    found = step(accelerated(plain, loss=loss), **batch)
    assert found.keys() == expected.keys()
    errors = {n: relative_error(found[n], expected[n]) for n in expected}
    assert max(errors.values()) < 1e-6, errors


@pytest.mark.parametrize("loss", FORMS)
@pytest.mark.parametrize("items", [None, TARGETS], ids=str)
def test_labels_that_padding_would_have_to_predict_are_refused(items, loss):
    model = accelerated(transformers_model(), loss=loss).train()
    given = BATCH | {"labels": BATCH["input_ids"], "num_items_in_batch": items}
    with pytest.raises(ValueError, match="row 1, column 5 is 0, .* give -100 there"):
        model(**given)
    shifted = torch.nn.functional.pad(BATCH["input_ids"], (0, 1), value=-100)[:, 1:]
    with pytest.raises(ValueError, match="row 1, column 4 is 0, .* give -100 there"):
        model(**given | {"shift_labels": shifted})
    # What is ignored is no label.
    assert model(**given, ignore_index=0).loss > 0


def test_shifted_labels_right_behind_the_text_are_the_same():
    model, batch = accelerated(transformers_model()), behind_the_text()
    shifted = torch.nn.functional.pad(batch["labels"], (0, 1), value=-100)[:, 1:]
    expected = model(**batch).loss
    assert torch.equal(model(**batch | {"labels": None}, shift_labels=shifted).loss, expected)


@pytest.mark.parametrize("loss", FORMS)
@pytest.mark.parametrize("labels", ["ids", "-100"])
@pytest.mark.parametrize("items", [None, 0, 5], ids=str)
def test_a_batch_of_padding_alone_gives_every_parameter_zeros(items, labels, loss):
    model = accelerated(transformers_model(**LATENT), loss=loss).train()
    ids = tokens(2, 5)
    given = ids if labels == "ids" else torch.full_like(ids, -100)
    out = model(ids, torch.zeros_like(ids), labels=given, num_items_in_batch=items)
    assert out.loss == 0
    out.loss.backward()
    missing = [n for n, p in model.named_parameters() if p.grad is None]
    assert not missing, missing
    assert all(torch.count_nonzero(p.grad) == 0 for p in model.parameters())


@pytest.mark.parametrize("tail", [0, 4])
def test_documents_told_by_positions_beside_a_mask_do_not_see_each_other(tail):
    model = accelerated(transformers_model()).eval()
    a, b = documents([9, 7])
    row = torch.cat([a, b, torch.zeros(1, tail, dtype=torch.int64)], 1)
    positions = torch.cat([torch.arange(9), torch.arange(7), torch.zeros(tail, dtype=int)])[None]
    mask = (torch.arange(16 + tail) < 16).long()[None]
    said = {"attention_mask": mask, "position_ids": positions}
    assert close(model(row, **said).logits[:, 9:16], model(b).logits)
    labels = row.masked_fill(mask == 0, -100)
    loss = model(row, labels=labels, **said).loss
    alone = model(a, labels=a).loss * 8 + model(b, labels=b).loss * 6
    assert close(loss, alone / 14)


def test_layers_alone_obey_positions_beside_a_mask():
    model = accelerated(transformers_model()).eval()
    x, positions = torch.randn(1, 16, 48), torch.cat([torch.arange(9), torch.arange(7)])[None]
    said = {"attention_mask": torch.ones(1, 16), "position_ids": positions}
    for block in model.model.layers:
        assert close(block(x, **said)[:, 9:], block(x[:, 9:]))


@pytest.mark.parametrize("ids", [tokens(2, 5), tokens(2, 5)[:, :0]], ids=["padding", "no token"])
def test_adapters_get_zeros_from_a_batch_of_padding_alone(ids):
    """On projections and on the experts' stacks."""
    model = add_lora(accelerated(transformers_model(**LATENT))).train()
    loss = model(input_ids=ids, attention_mask=torch.zeros_like(ids), labels=ids).loss
    assert loss == 0
    loss.backward()
    trained = {n: p for n, p in model.named_parameters() if p.requires_grad}
    assert any("experts" in n for n in trained)
    missing = [n for n, p in trained.items() if p.grad is None or torch.count_nonzero(p.grad)]
    assert not missing, missing


@pytest.mark.parametrize("loss", FORMS)
@pytest.mark.parametrize("shifted", [False, True])
def test_labels_in_32_bits_are_those_in_64(loss, shifted):
    model = accelerated(transformers_model(), loss=loss).train()
    labels = BATCH["labels"]
    if shifted:
        labels = torch.nn.functional.pad(labels, (0, 1), value=-100)[:, 1:]
    name = "shift_labels" if shifted else "labels"
    batch = {"input_ids": BATCH["input_ids"], "attention_mask": BATCH["attention_mask"]}
    expected = step(model, **batch, **{name: labels})
    found = step(model, **batch, **{name: labels.int()})
    assert found.keys() == expected.keys()
    assert all(torch.equal(found[n], expected[n]) for n in expected)
