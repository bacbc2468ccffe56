"""Whom a document is batched with, recomputed blocks, and an fp32 stream: what each may change."""

import pytest
import torch
from hypothesis import given, settings
from torch import Tensor

from nemotron_v3 import NemotronV3ForCausalLM, SequenceLayout
from tests.accuracy import layouts
from tests.models import ALL_BLOCKS, WITHOUT_MOE, labels_of, tiny_model, tokens


def results(model: NemotronV3ForCausalLM, ids: Tensor, layout: SequenceLayout) -> list[Tensor]:
    """Logits, loss and every gradient."""
    model.zero_grad()
    out = model(ids, labels=labels_of(ids, layout), layout=layout)
    out.loss.backward()
    return [out.logits.detach(), out.loss.detach(), *(p.grad for p in model.parameters())]


def assert_same(a: list[Tensor], b: list[Tensor]) -> None:
    assert all(torch.equal(x, y) for x, y in zip(a, b, strict=True))


# --- batch composition --------------------------------------------------------------------------


@pytest.mark.parametrize("pattern", [WITHOUT_MOE, ALL_BLOCKS])
def test_other_rows_of_a_batch_change_nothing(pattern):
    model, ids = tiny_model(pattern), tokens(3, 20)
    others = torch.stack([tokens(20, seed=5), ids[1], tokens(20, seed=6)])
    assert torch.equal(model(ids).logits[1], model(others).logits[1])


@pytest.mark.parametrize("pattern", [WITHOUT_MOE, ALL_BLOCKS])
def test_the_number_and_length_of_other_rows_changes_rounding_only(pattern):
    """Products have other shapes then."""
    model, ids = tiny_model(pattern), tokens(20)
    alone = model(ids[None]).logits[0]
    for batch, width in ((2, 20), (5, 33), (3, 128)):
        rows, mask = tokens(batch, width, seed=7), torch.ones(batch, width, dtype=torch.int64)
        rows[1, :20] = ids
        mask[1, 20:] = 0
        beside = model(rows, attention_mask=mask).logits[1, :20]
        assert (beside - alone).abs().max() <= 1e-5 * alone.abs().max()


@pytest.mark.parametrize("pattern", [WITHOUT_MOE, ALL_BLOCKS])
def test_the_order_of_rows_changes_rounding_only(pattern):
    model, ids, order = tiny_model(pattern), tokens(4, 20), torch.tensor([2, 0, 3, 1])
    a, b = model(ids).logits[order], model(ids[order]).logits
    assert (a - b).abs().max() <= 1e-5 * a.abs().max()


# --- checkpointing ------------------------------------------------------------------------------


@settings(max_examples=12)
@given(layouts(chunk_size=16, max_documents=4))
def test_recomputing_blocks_changes_nothing_in_any_layout(layout):
    model, ids = tiny_model(), tokens(*layout.shape)
    expected = results(model, ids, layout)
    model.gradient_checkpointing_enable()
    assert_same(results(model, ids, layout), expected)
    model.gradient_checkpointing_disable()
    assert_same(results(model, ids, layout), expected)


# --- residual_in_fp32 ---------------------------------------------------------------------------


@settings(max_examples=8)
@given(layouts(chunk_size=16, max_documents=4))
def test_an_fp32_stream_is_no_change_in_an_fp32_model(layout):
    ids = tokens(*layout.shape)
    assert_same(
        results(tiny_model(residual_in_fp32=True), ids, layout),
        results(tiny_model(residual_in_fp32=False), ids, layout),
    )


@settings(max_examples=8)
@given(layouts(chunk_size=16, max_documents=4))
def test_an_fp32_stream_keeps_padded_equal_to_packed_in_bf16(layout):
    model = tiny_model(residual_in_fp32=True).bfloat16()
    ids = tokens(*layout.shape)
    padded = model(ids, layout=layout).logits
    packed = model(layout.pack(ids), layout=layout.packed).logits
    assert torch.equal(layout.pack(padded), packed)
    assert torch.equal(padded, layout.unpack(packed))
