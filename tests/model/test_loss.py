"""The loss without the logits: when they are made, of what, and which heads have to be called."""

import pickle

import pytest
import torch
from torch import nn
from torch.utils import _pytree as pytree

from nemotron_v3 import SequenceLayout
from nemotron_v3.model.model import plain_weight
from tests.models import tiny_model, tokens

IDS = tokens(2, 9)


def calls(module: nn.Module, monkeypatch) -> list[int]:
    """How many rows each later call of `module.__class__.forward` sees."""
    seen = []
    forward = type(module).forward

    def counted(self, x):
        if self is module:
            seen.append(x.numel() // x.shape[-1])
        return forward(self, x)

    monkeypatch.setattr(type(module), "forward", counted)
    return seen


@pytest.mark.parametrize("tied", [False, True])
def test_logits_are_made_only_when_they_are_read(tied, monkeypatch):
    model = tiny_model(tie_word_embeddings=tied)
    expected = model(IDS).logits
    seen = calls(model.lm_head, monkeypatch)
    out = model(IDS, labels=IDS)
    out.loss.backward()
    assert seen == []
    assert torch.equal(out.logits, expected) and out.logits is out.logits
    assert seen == [18]


def test_logits_asked_for_beside_the_loss_are_the_only_ones(monkeypatch):
    model = tiny_model()
    seen = calls(model.lm_head, monkeypatch)
    assert model(IDS, labels=IDS, logits_to_keep=2).logits.shape == (2, 2, 97)
    assert seen == [4]


def test_logits_read_late_have_a_graph_where_the_forward_pass_had_one():
    model = tiny_model()
    out = model(IDS, labels=IDS)
    with torch.no_grad():
        assert out.logits.requires_grad
    with torch.no_grad():
        out = model(IDS, labels=IDS)
    assert not out.logits.requires_grad


@pytest.mark.parametrize("within", [True, False])
def test_logits_read_late_have_the_autocast_of_the_forward_pass(within):
    model = tiny_model("*-*")
    with torch.autocast("cpu", torch.bfloat16, enabled=within), torch.no_grad():
        expected, out = model(IDS).logits, model(IDS, labels=IDS)
    with torch.autocast("cpu", torch.bfloat16, enabled=not within):
        assert out.logits.dtype == expected.dtype and torch.equal(out.logits, expected)
    assert (expected.dtype == torch.bfloat16) == within


def test_logits_of_weights_that_are_gone_are_refused():
    model = tiny_model()
    out = model(IDS, labels=IDS)
    out.loss.backward()
    torch.optim.SGD(model.parameters(), lr=0.1).step()
    with pytest.raises(RuntimeError, match="not read before the head's weight changed"):
        _ = out.logits
    out = model(IDS, labels=IDS)
    model.double()
    with pytest.raises(RuntimeError, match="head's weight changed"):
        _ = out.logits


def test_a_copy_of_the_output_holds_its_logits():
    model = tiny_model()
    with torch.no_grad():
        out = model(IDS, labels=IDS)
    assert "unread" in repr(out)
    copied = pickle.loads(pickle.dumps(out))
    assert torch.equal(copied.logits, model(IDS).logits) and torch.equal(copied.loss, out.loss)


class Doubled(nn.Linear):
    """Stands for an adapter: another class, another product."""

    def forward(self, x):
        return 2 * super().forward(x)


def test_an_output_is_a_tree_of_its_tensors_and_stays_unread(monkeypatch):
    """Wrappers such as DDP put other tensors in the place of those that forward returned."""
    model = tiny_model()
    expected = model(IDS, labels=IDS, output_hidden_states=True, use_cache=True)
    found = calls(model.lm_head, monkeypatch)
    out = model(IDS, labels=IDS, output_hidden_states=True, use_cache=True)
    halved = pytree.tree_map(lambda tensor: tensor / 2, out)
    assert not found and halved.past_key_values is out.past_key_values
    assert torch.equal(halved.loss, expected.loss / 2)
    assert all(
        torch.equal(a, b / 2)
        for a, b in zip(halved.hidden_states, expected.hidden_states, strict=True)
    )
    torch.testing.assert_close(halved.logits, expected.logits / 2)
    torch.testing.assert_close(out.logits, expected.logits)
    inner = pytree.tree_map(lambda tensor: tensor / 2, model.model(IDS))
    assert torch.equal(inner.last_hidden_state, model.model(IDS).last_hidden_state / 2)


def replace_by_a_subclass(model):
    head = Doubled(48, 97, bias=False)
    head.weight = model.lm_head.weight
    model.lm_head = head


def hook(model):
    model.lm_head.register_forward_hook(lambda module, args, out: 2 * out)


def patch(model):
    forward = model.lm_head.forward
    model.lm_head.forward = lambda x: 2 * forward(x)


def double_the_input(model):
    model.lm_head.register_forward_pre_hook(lambda module, args: (2 * args[0],))


@pytest.mark.parametrize("change", [replace_by_a_subclass, hook, patch, double_the_input])
def test_a_head_that_is_more_than_its_matrix_is_called(change):
    plain, model = tiny_model(), tiny_model()
    assert plain_weight(plain.lm_head) is plain.lm_head.weight
    change(model)
    assert plain_weight(model.lm_head) is None
    out = model(IDS, labels=IDS)
    doubled = 2 * plain(IDS).logits
    torch.testing.assert_close(out.logits, doubled)
    expected = nn.functional.cross_entropy(doubled[:, :-1].flatten(0, 1), IDS[:, 1:].flatten())
    torch.testing.assert_close(out.loss, expected)
    out.loss.backward()
    assert model.lm_head.weight.grad.abs().sum() > 0


def test_a_bias_of_the_head_counts():
    model = tiny_model()
    model.lm_head.bias = nn.Parameter(torch.randn(97))
    assert plain_weight(model.lm_head) is None
    logits = model(IDS).logits
    expected = nn.functional.cross_entropy(logits[:, :-1].flatten(0, 1), IDS[:, 1:].flatten())
    torch.testing.assert_close(model(IDS, labels=IDS).loss, expected)


@pytest.mark.parametrize("tied", [False, True])
def test_gradients_equal_those_through_all_logits(tied):
    layout = SequenceLayout.from_lengths([5, 1, 30, 44])
    ids = tokens(80)
    fused, whole = (tiny_model(tie_word_embeddings=tied).double() for _ in range(2))
    whole.lm_head.register_forward_hook(lambda *_: None)
    for model in (fused, whole):
        model(ids, labels=ids, layout=layout).loss.backward()
    for (name, a), b in zip(fused.named_parameters(), whole.parameters(), strict=True):
        assert (a.grad - b.grad).abs().max() <= 1e-12 * b.grad.abs().max(), name


def test_a_frozen_head_costs_no_gradient():
    model = tiny_model()
    model.lm_head.weight.requires_grad_(False)
    model(IDS, labels=IDS).loss.backward()
    assert model.lm_head.weight.grad is None
    assert model.model.embeddings.weight.grad.abs().sum() > 0


def test_a_compiled_model_returns_its_loss_and_logits():
    model = tiny_model("*-*")
    layout = SequenceLayout.plain(2, 9)

    def run(ids):
        return model(ids, labels=ids, layout=layout)

    torch._dynamo.reset()
    expected, out = run(IDS), torch.compile(run, backend="aot_eager")(IDS)
    torch.testing.assert_close(out.loss, expected.loss)
    torch.testing.assert_close(out.logits, expected.logits)
