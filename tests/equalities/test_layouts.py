"""padded = packed = each document alone, for the whole model: logits and every gradient.

A packed and a padded batch run the same packed tokens, so they agree bit for bit; a document alone
meets matmuls of other shapes, so it agrees within 1e-5 of the largest value in fp32.
"""

import pytest
import torch
from hypothesis import given, settings

from nemotron_v3 import NemotronV3ForCausalLM, SequenceLayout
from tests.accuracy import document_lengths
from tests.models import WITHOUT_MOE, labels_of, tiny_model, tokens

# One-token documents, lengths around the conv width (4) and the chunk (16).
LENGTHS = [1, 3, 4, 5, 1, 15, 16, 17, 2, 33]
BIASES = {"use_bias": True, "mlp_bias": True, "attention_bias": True, "moe_latent_size": 28}


def documents(lengths: list[int] | tuple[int, ...]) -> list[torch.Tensor]:
    return list(tokens(sum(lengths)).split(list(lengths)))


def padded(docs: list[torch.Tensor], side: str) -> tuple[torch.Tensor, torch.Tensor]:
    """`[B, S]` ids with junk at the padding, and their mask."""
    width = max(len(d) for d in docs) + 2
    ids = tokens(len(docs), width, seed=9)
    mask = torch.zeros(len(docs), width, dtype=torch.int64)
    for row, doc in enumerate(docs):
        spare = width - len(doc)
        start = {"left": spare, "right": 0, "mixed": row % (spare + 1)}[side]
        ids[row, start : start + len(doc)] = doc
        mask[row, start : start + len(doc)] = 1
    return ids, mask


def backward(model: NemotronV3ForCausalLM, logits: list[torch.Tensor], docs: list[torch.Tensor]):
    """The summed loss of all documents, and each parameter's gradient of it."""
    losses = [
        torch.nn.functional.cross_entropy(out[:-1].float(), doc[1:], reduction="sum")
        for out, doc in zip(logits, docs, strict=True)
        if len(doc) > 1
    ]
    # A one-token document has no target: let its logits reach the loss all the same.
    total = sum(losses) + sum(out.square().mean() for out in logits)
    # A softmax does not feel a shift of its scores: the true gradient of k_proj.bias is 0.
    kept = [p for name, p in model.named_parameters() if not name.endswith("k_proj.bias")]
    return torch.autograd.grad(total, kept)


def run_packed(model, docs):
    layout = SequenceLayout.from_lengths([len(d) for d in docs])
    return list(model(torch.cat(docs), layout=layout).logits.split([len(d) for d in docs]))


def run_padded(model, docs, side):
    ids, mask = padded(docs, side)
    logits = model(ids, attention_mask=mask).logits
    return [row[m == 1] for row, m in zip(logits, mask, strict=True)]


def run_alone(model, docs):
    return [model(doc[None]).logits[0] for doc in docs]


def assert_near(measured, expected):
    for a, b in zip(measured, expected, strict=True):
        assert (a - b).abs().max() <= 1e-5 * b.abs().max()


@pytest.mark.parametrize("side", ["left", "right", "mixed"])
@pytest.mark.parametrize("changes", [{}, BIASES], ids=["plain", "biases and latent"])
def test_padded_equals_packed_bit_for_bit(side, changes):
    model, docs = tiny_model(**changes), documents(LENGTHS)
    packed, rows = run_packed(model, docs), run_padded(model, docs, side)
    assert all(torch.equal(a, b) for a, b in zip(packed, rows, strict=True))
    a, b = backward(model, packed, docs), backward(model, rows, docs)
    assert_near(b, a)


@pytest.mark.parametrize("changes", [{}, BIASES], ids=["plain", "biases and latent"])
def test_packed_equals_alone(changes):
    model, docs = tiny_model(**changes), documents(LENGTHS)
    packed, alone = run_packed(model, docs), run_alone(model, docs)
    assert_near(packed, alone)
    assert_near(backward(model, packed, docs), backward(model, alone, docs))


@settings(max_examples=15)
@given(document_lengths(conv_width=4, chunk_size=16))
def test_any_pack_equals_its_documents(lengths):
    model, docs = tiny_model(), documents(lengths)
    assert_near(run_packed(model, docs), run_alone(model, docs))


def test_the_losses_of_all_layouts_agree():
    model, docs = tiny_model().double(), documents(LENGTHS)
    count = sum(LENGTHS) - len(LENGTHS)
    alone = [model(d[None], labels=d[None]).loss * (len(d) - 1) for d in docs if len(d) > 1]
    expected = sum(alone) / count
    flat = torch.cat(docs)
    offsets = torch.tensor([0, *LENGTHS]).cumsum(0)
    numbers = torch.arange(len(docs)).repeat_interleave(torch.tensor(LENGTHS))
    ids, mask = padded(docs, "mixed")
    losses = [
        model(flat, labels=flat, cu_seqlens=offsets, max_seqlen=33).loss,
        model(flat[None], labels=flat[None], seq_idx=numbers[None]).loss,
        model(ids, mask, labels=labels_of(ids, mask)).loss,
    ]
    for loss in losses:
        torch.testing.assert_close(loss, expected, rtol=1e-12, atol=0)


def test_another_document_changes_nothing():
    model, docs = tiny_model(WITHOUT_MOE), documents(LENGTHS)
    before = run_packed(model, docs)
    changed = [tokens(len(d), seed=3) if i == 5 else d for i, d in enumerate(docs)]
    after = run_packed(model, changed)
    for i, (a, b) in enumerate(zip(before, after, strict=True)):
        assert torch.equal(a, b) == (i != 5)


@pytest.mark.parametrize("t", [0, 3, 15, 16, 17, 39])
def test_a_later_token_changes_nothing_before_it(t):
    model, ids = tiny_model(WITHOUT_MOE), tokens(1, 40)
    other = ids.clone()
    other[0, t] = (other[0, t] + 1) % 97
    a, b = model(ids).logits, model(other).logits
    assert torch.equal(a[:, :t], b[:, :t])
    assert (a[:, t:] != b[:, t:]).any(-1).all()
