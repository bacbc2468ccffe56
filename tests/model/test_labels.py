"""Labels at padding, and the sum of the losses of several parts."""

import pytest
import torch

from nemotron_v3 import SequenceLayout
from tests.models import labels_of, tiny_model, tokens

IDS = tokens(3, 6)
MASK = torch.tensor([[1, 1, 1, 0, 0, 0], [0, 0, 1, 1, 1, 1], [0, 0, 0, 0, 0, 0]])
LABELS = labels_of(IDS, MASK)
SAID = {
    "a mask": {"attention_mask": MASK},
    "numbers": {"seq_idx": MASK - 1},
    "a layout": {"layout": SequenceLayout.from_padding_mask(MASK)},
}


@pytest.mark.parametrize("said", SAID.values(), ids=SAID)
def test_a_label_right_behind_the_text_counts(said):
    """As an end token that the mask hides: the loss of the text with it."""
    model, labels = tiny_model().double(), LABELS.clone()
    labels[0, 3] = 7
    loss = model(IDS, labels=labels, **said).loss
    first = torch.tensor([[*IDS[0, :3], 7]])
    alone = [model(first, labels=first).loss * 3, model(IDS[1:2, 2:], labels=IDS[1:2, 2:]).loss * 3]
    torch.testing.assert_close(loss, sum(alone) / 6, rtol=1e-12, atol=0)


@pytest.mark.parametrize("said", SAID.values(), ids=SAID)
@pytest.mark.parametrize(("row", "column"), [(0, 4), (0, 5), (1, 1)])
def test_a_label_that_padding_would_have_to_predict_is_refused(row, column, said):
    model, labels = tiny_model("M"), LABELS.clone()
    labels[row, column] = 7
    with pytest.raises(ValueError, match=f"row {row}, column {column} is 7, .* give -100"):
        model(IDS, labels=labels, **said)


def test_labels_that_nobody_asks_for_are_let_through():
    """The first of a row, and those of a row that fills up a batch."""
    model, labels = tiny_model("M"), LABELS.clone()
    labels[1, 0], labels[2] = 7, IDS[2]
    assert model(IDS, MASK, labels=labels).loss == model(IDS, MASK, labels=LABELS).loss


def test_a_token_before_a_hole_predicts_one_label():
    model, ids, mask = tiny_model("M"), tokens(1, 5), torch.tensor([[1, 1, 0, 1, 1]])
    labels = labels_of(ids, mask)
    assert model(ids, mask, labels=labels).loss > 0
    labels[0, 2] = 7
    with pytest.raises(ValueError, match="it predicts one of them"):
        model(ids, mask, labels=labels)
    labels[0, 3] = -100
    assert model(ids, mask, labels=labels).loss > 0


def test_padding_of_a_pack_is_no_other():
    model, ids = tiny_model("M"), tokens(9)
    offsets, places = torch.tensor([0, 3, 6]), torch.tensor([0, 5, 9])
    said = {"cu_seqlens": offsets, "cu_seqlens_padded": places}
    labels = ids.index_fill(0, torch.tensor([4]), -100)
    model(ids, labels=labels, **said)  # tokens 3 and 8 stand behind documents
    with pytest.raises(ValueError, match="the label at token 4 is"):
        model(ids, labels=ids, **said)


# --- parts of a batch -----------------------------------------------------------------------------

PARTS = [tokens(1, 5), tokens(2, 30, seed=1), tokens(1, 2, seed=2)]
TARGETS = 4 + 2 * 29 + 1


def gradients(model, losses):
    model.zero_grad()
    for loss in losses:
        loss.backward()
    return [p.grad.clone() for p in model.parameters()]


@pytest.mark.parametrize("items", [TARGETS, torch.tensor(TARGETS), torch.tensor([float(TARGETS)])])
@pytest.mark.parametrize("called", [False, True], ids=["plain head", "called head"])
def test_parts_with_num_items_add_up_to_the_whole(items, called):
    model = tiny_model().double()
    if called:
        model.lm_head.register_forward_hook(lambda *_: None)
    flat = torch.cat([part.flatten() for part in PARTS])
    layout = SequenceLayout.from_lengths([5, 30, 30, 2])
    whole = model(flat, labels=flat, layout=layout).loss
    losses = [model(part, labels=part, num_items_in_batch=items).loss for part in PARTS]
    torch.testing.assert_close(sum(losses), whole, rtol=1e-12, atol=0)
    pairs = zip(gradients(model, losses), gradients(model, [whole]), strict=True)
    assert all((a - b).abs().max() <= 1e-10 * b.abs().max() for a, b in pairs)


@pytest.mark.parametrize("items", [None, 0, 5, torch.tensor(0)])
def test_a_part_without_targets_is_0_with_a_graph(items):
    model, ids = tiny_model(), tokens(2, 5)
    loss = model(ids, labels=torch.full_like(ids, -100), num_items_in_batch=items).loss
    assert loss == 0
    assert all(torch.count_nonzero(g) == 0 for g in gradients(model, [loss]))


@pytest.mark.parametrize(
    ("items", "kind", "message"),
    [
        ("9", TypeError, "num_items_in_batch is '9'"),
        (True, TypeError, "num_items_in_batch is True"),
        (-1, ValueError, "num_items_in_batch is -1"),
        (float("inf"), ValueError, "num_items_in_batch is inf"),
        (2**70, ValueError, "num_items_in_batch is 1180591620717411303424"),
        (torch.tensor([3, 4]), TypeError, r"shape \(2,\)"),
    ],
)
def test_what_is_no_number_of_items_is_refused(items, kind, message):
    with pytest.raises(kind, match=message):
        tiny_model("M")(IDS, labels=IDS, num_items_in_batch=items)


@pytest.mark.parametrize("dtype", [torch.uint8, torch.int16, torch.bool, torch.float32])
def test_labels_of_other_dtypes_are_refused(dtype):
    with pytest.raises(TypeError, match=f"labels are {dtype}: give token ids as integers, int64"):
        tiny_model("M")(IDS, labels=IDS.to(dtype))


def test_the_model_obeys_positions_that_start_anew():
    model = tiny_model()
    a, b = tokens(1, 9), tokens(1, 7, seed=1)
    row, positions = torch.cat([a, b], 1), torch.cat([torch.arange(9), torch.arange(7)])[None]
    alone = model(b).logits
    for mask in (None, torch.ones_like(row)):
        logits = model(row, mask, position_ids=positions).logits[:, 9:]
        torch.testing.assert_close(logits, alone, rtol=0, atol=1e-5)
