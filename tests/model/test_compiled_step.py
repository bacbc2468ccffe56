"""A training step as one graph, which does not know how long the documents are."""

import random

import pytest
import torch
from torch._dynamo.testing import CompileCounterWithBackend

from nemotron_v3 import SequenceLayout
from nemotron_v3.layout import handles
from tests.models import labels_of, tiny_model, tokens

TOKENS, STEPS = 40, 20


def packs(seed: int) -> list[SequenceLayout]:
    """Packs of equally many tokens in other numbers and lengths of documents."""
    draw = random.Random(seed)
    layouts = []
    for _ in range(STEPS):
        cuts = sorted(draw.sample(range(1, TOKENS), draw.randint(0, 5)))
        ends = [*cuts, TOKENS]
        layouts.append(
            SequenceLayout.from_lengths([b - a for a, b in zip([0, *cuts], ends, strict=True)])
        )
    return layouts


def compiled(model):
    torch._dynamo.reset()
    counter = CompileCounterWithBackend("aot_eager")

    def step(ids, labels, layout):
        return model(ids, labels=labels, layout=layout).loss

    return torch.compile(step, backend=counter, fullgraph=True), step, counter


def gradients(model, loss):
    model.zero_grad()
    loss.backward()
    return {n: p.grad.clone() for n, p in model.named_parameters() if p.grad is not None}


def test_twenty_packs_are_two_compilations():
    model = tiny_model("M*-E")
    run, step, counter = compiled(model)
    for n, layout in enumerate(packs(seed=0)):
        ids = tokens(TOKENS, seed=n)
        loss, eager = run(ids, ids, layout), step(ids, ids, layout)
        torch.testing.assert_close(loss, eager)
        if n not in (0, 1, STEPS - 1):
            continue
        found, expected = gradients(model, loss), gradients(model, eager)
        assert found.keys() == expected.keys()
        for name, gradient in expected.items():
            torch.testing.assert_close(found[name], gradient, msg=name)
    assert counter.frame_count <= 3 and len({layout.num_documents for layout in packs(0)}) > 3


@pytest.mark.integration
def test_padding_is_left_out_in_a_graph_too():
    model = tiny_model("M*-E")
    run, step, _ = compiled(model)
    for n in range(2):
        mask = torch.ones(3, 12, dtype=torch.int64)
        mask[1, : 3 + n], mask[2, -2:] = 0, 0
        layout = SequenceLayout.from_padding_mask(mask)
        ids = tokens(3, 12, seed=n)
        labels = labels_of(ids, mask)
        loss, eager = run(ids, labels, layout), step(ids, labels, layout)
        torch.testing.assert_close(loss, eager)
        found, expected = gradients(model, loss), gradients(model, eager)
        for name, gradient in expected.items():
            torch.testing.assert_close(found[name], gradient, msg=name)


def test_a_layout_is_found_until_its_backward_pass():
    handle = SequenceLayout.from_lengths([3, 4]).handle
    with pytest.raises(RuntimeError, match=f"layout number {handle}, which is gone"):
        handles.layout_of(handle)
    layout = SequenceLayout.from_lengths([3, 4])
    assert handles.layout_of(layout.handle) is layout
    handle = layout.handle
    del layout
    assert handles.layout_of(handle).lengths == (3, 4)
    assert handles.layout_of(handles.of_packed(handle)).lengths == (3, 4)
