"""Passes over plain grids of one shape share their layout, and the index tables made for it."""

import pytest
import torch
from torch._subclasses.fake_tensor import FakeTensorMode

from nemotron_v3 import SequenceLayout
from nemotron_v3.layers.context import ForwardContext
from nemotron_v3.ops.causal_conv1d import portable_borders
from tests.models import tiny_model

CPU = torch.device("cpu")


def entered(shape: tuple[int, ...]) -> SequenceLayout:
    return ForwardContext.enter(shape, CPU).layout


def test_a_shape_has_one_layout():
    first = entered((3, 11))
    assert entered((3, 11)) is first
    assert (first.shape, first.lengths) == ((3, 11), (11, 11, 11))
    assert entered((11, 3)).lengths == (3,) * 11
    assert entered((33,)).lengths == (33,)
    assert entered((3, 11)) is first


def test_index_tables_are_made_at_the_first_pass_alone(monkeypatch):
    made = []
    places = portable_borders._places
    monkeypatch.setattr(portable_borders, "_places", lambda *a: made.append(1) or places(*a))
    model, ids = tiny_model("MM*E").eval(), torch.arange(2 * 13).view(2, 13)
    with torch.no_grad():
        logits = model(ids).logits
        assert made
        made.clear()
        assert torch.equal(model(ids).logits, logits)
        assert made == []
        fresh = SequenceLayout.plain(2, 13)
        assert torch.equal(model(ids, layout=fresh).logits, logits)
    assert made


def test_a_pass_in_inference_mode_leaves_nothing_that_training_cannot_use():
    model, ids = tiny_model("M*E"), torch.arange(2 * 17).view(2, 17)
    with torch.inference_mode():
        model(ids)
    model(ids, labels=ids).loss.backward()
    gradients = [p.grad for p in model.parameters()]
    model.zero_grad()
    model(ids, labels=ids, layout=SequenceLayout.plain(2, 17)).loss.backward()
    for ours, own in zip(gradients, model.parameters(), strict=True):
        assert (ours is own.grad is None) or torch.equal(ours, own.grad)


@pytest.mark.parametrize("around", ["functionalize", "fake", "compile"])
def test_what_sees_operations_has_a_layout_of_its_own(around):
    shared, found = entered((2, 19)), []

    def look(x):
        found.append(entered((2, 19)))
        return x + found[-1].num_tokens

    if around == "functionalize":
        torch.func.functionalize(look)(torch.ones(2))
    elif around == "fake":
        with FakeTensorMode():
            look(torch.ones(2))
    else:
        model, ids = tiny_model("-"), torch.arange(38).view(2, 19)
        compiled = torch.compile(model, backend="eager", fullgraph=True)
        assert torch.equal(compiled(ids).logits, model(ids).logits)
    assert shared not in found
    assert entered((2, 19)) is shared and type(shared.cu_seqlens) is torch.Tensor
