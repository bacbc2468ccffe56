"""Losses, checkpointing and compilation of accelerated models."""

import copy

import pytest
import torch
from torch import nn

from tests.hf.models import (
    accelerated,
    close,
    documents,
    gradients,
    right_padded,
    tokens,
    transformers_model,
)


@pytest.fixture
def plain():
    return transformers_model()


def step(model: nn.Module, **batch) -> dict[str, torch.Tensor]:
    model.train()
    model.zero_grad()
    loss = model(**batch).loss
    loss.backward()
    return {"loss": loss.detach(), **gradients(model)}


def same(found: dict, expected: dict, allowed: float = 2e-5) -> None:
    assert found.keys() == expected.keys()
    wrong = [name for name in found if not close(found[name], expected[name], allowed)]
    assert not wrong, wrong


BATCHES = {
    "plain": {"input_ids": tokens(2, 30), "labels": tokens(2, 30)},
    "padded": right_padded(documents((30, 7, 1))),
    "packed": {
        "input_ids": tokens(1, 30),
        "labels": tokens(1, 30),
        "position_ids": torch.cat([torch.arange(12), torch.arange(18)])[None],
    },
}


# --- the loss ---------------------------------------------------------------------------------


@pytest.mark.parametrize("items", [7, torch.tensor(50)], ids=["int", "tensor"])
def test_gradient_accumulation_divides_by_all_items(plain, items):
    batch = BATCHES["plain"] | {"num_items_in_batch": items}
    same(step(accelerated(plain), **batch), step(plain, **batch))


def test_shifted_labels_and_another_ignored_label(plain):
    ids = tokens(2, 30)
    shifted = torch.roll(ids, -1, 1)
    shifted[:, -1] = 5
    shifted[0, 3:9] = 5
    batch = {"input_ids": ids, "labels": ids, "shift_labels": shifted, "ignore_index": 5}
    same(step(accelerated(plain), **batch), step(plain, **batch))


def test_a_loss_of_the_users_own(plain):
    def own(logits, labels, vocab_size, **kwargs):
        assert vocab_size == logits.shape[-1] and kwargs == {"num_items_in_batch": 3}
        return logits.square().mean() + labels.sum()

    model = accelerated(plain)
    plain.loss_function = model.loss_function = own
    batch = BATCHES["plain"] | {"num_items_in_batch": 3}
    same(step(model, **batch), step(plain, **batch))
    with pytest.raises(ValueError, match="loss='linear' cannot compute the loss_function"):
        step(accelerated(plain, loss="linear"), **batch)


@pytest.mark.parametrize("batch", BATCHES.values(), ids=BATCHES)
@pytest.mark.parametrize("head", ["plain", "called"])
def test_the_linear_loss_is_the_loss(plain, batch, head, monkeypatch):
    monkeypatch.setattr("nemotron_v3.hf.model.LOSS_CHUNK", 16)
    expected, model = accelerated(plain), accelerated(plain, loss="linear")
    if head == "called":  # as one with an adapter is
        model.lm_head.register_forward_hook(lambda module, args, output: None)
    batch = batch | {"num_items_in_batch": 40}
    same(step(model, **batch), step(expected, **batch), 1e-5)
    out = model(**batch)
    assert out.logits is None and out.loss is not None
    model.eval()
    assert close(model(**batch).logits, expected.eval()(**batch).logits)


def test_nothing_to_predict_is_no_loss(plain):
    for loss in ("logits", "linear"):
        found = step(accelerated(plain, loss=loss), input_ids=tokens(1, 1), labels=tokens(1, 1))
        assert not any(tensor.any() for tensor in found.values())


# --- what a Trainer switches on ------------------------------------------------------------------


@pytest.mark.parametrize("batch", BATCHES.values(), ids=BATCHES)
@pytest.mark.filterwarnings("ignore:`gradient_checkpointing_enable` is deprecated")
@pytest.mark.parametrize("reentrant", [False, True])
def test_gradient_checkpointing_changes_nothing(plain, batch, reentrant):
    model = accelerated(plain)
    expected = step(model, **batch)
    kwargs = {"use_reentrant": reentrant}
    model.gradient_checkpointing_enable(gradient_checkpointing_kwargs=kwargs)
    if reentrant:
        model.enable_input_require_grads()
    found = step(model, **batch)
    assert all(torch.equal(found[name], expected[name]) for name in expected)
    calls = []
    mixer = model.model.layers[0].mixer
    mixer.register_forward_pre_hook(lambda *args: calls.append(1))
    step(model, **batch)
    assert len(calls) == 2  # once more in the backward pass


def test_dropout_in_attention_acts_in_training_alone():
    model, ids = accelerated(transformers_model(attention_dropout=0.5)), tokens(1, 20)
    expected = accelerated(transformers_model())(ids).logits
    assert torch.equal(model(ids).logits, expected)
    model.train()
    assert not close(model(ids).logits, expected, 1e-3)


def test_hidden_states_and_router_logits(plain):
    ids = tokens(2, 20)
    wanted = {"output_hidden_states": True, "output_router_logits": True}
    ours, theirs = (model(ids, **wanted) for model in (accelerated(plain), plain))
    assert len(ours.hidden_states) == len(theirs.hidden_states) == 7
    for a, b in zip(ours.hidden_states, theirs.hidden_states, strict=True):
        assert close(a, b)
    assert len(ours.router_logits) == 2
    expected = theirs.get("router_logits")  # the oldest versions have none
    for n, (layer, found) in enumerate(zip((1, 5), ours.router_logits, strict=True)):
        block = plain.model.layers[layer]
        x = block.norm(theirs.hidden_states[layer]).flatten(0, 1)
        assert close(found, x @ block.mixer.gate.weight.T)
        if expected is not None:
            assert close(found, expected[n])


def test_a_tuple_where_it_is_asked_for(plain):
    ids = tokens(1, 6)
    ours, theirs = (
        model(ids, labels=ids, return_dict=False) for model in (accelerated(plain), plain)
    )
    assert [type(value) for value in ours] == [type(value) for value in theirs]
    assert close(ours[0], theirs[0]) and close(ours[1], theirs[1])


@pytest.mark.parametrize("kept", [1, 3, torch.tensor([0, 5])])
def test_logits_to_keep(plain, kept):
    ids, model = tokens(2, 9), accelerated(plain)
    all_of_them = model(ids).logits
    places = kept if isinstance(kept, torch.Tensor) else torch.arange(9 - kept, 9)
    assert close(model(ids, logits_to_keep=kept).logits, all_of_them[:, places], 1e-6)
    with_loss = model(ids, labels=ids, logits_to_keep=kept)
    assert close(with_loss.logits, all_of_them[:, places], 1e-6)
    assert close(with_loss.loss, model(ids, labels=ids).loss, 1e-6)


def test_the_decoder_alone(plain):
    batch = BATCHES["packed"]
    said = {name: batch[name] for name in ("input_ids", "position_ids")}
    model = accelerated(plain)
    hidden = model.get_decoder()(**said).last_hidden_state
    assert torch.equal(model.lm_head(hidden), model(**said).logits)


def test_a_block_and_a_mixer_called_alone(plain):
    """With transformers' own arguments, as code that goes layer by layer calls them."""
    model = accelerated(plain)
    x, mask = torch.randn(2, 10, 48), torch.ones(2, 10, dtype=torch.int64)
    mask[1, :4] = 0
    for ours, theirs in zip(model.model.layers, plain.model.layers, strict=True):
        assert close(ours(x), theirs(x), 1e-5)
        kind = type(ours.mixer).__name__
        if kind == "NemotronHMamba2Mixer":
            a, b = (layer.mixer(x, attention_mask=mask) for layer in (ours, theirs))
            assert close(a[mask == 1], b[mask == 1], 1e-5)
        if kind == "NemotronHAttention":
            assert close(ours.mixer(x)[0], theirs.mixer(x, attention_mask=None)[0], 1e-5)


@pytest.mark.heavy
@pytest.mark.parametrize("batch", BATCHES.values(), ids=BATCHES)
def test_torch_compile(plain, batch):
    model = accelerated(plain)
    expected = step(model, **batch)
    compiled = torch.compile(copy.deepcopy(model), backend="aot_eager")
    found = step(compiled, **batch)
    same({k.replace("_orig_mod.", ""): v for k, v in found.items()}, expected, 1e-5)


def test_bad_arguments_are_refused(plain):
    model, ids = accelerated(plain), tokens(1, 5)
    with pytest.raises(ValueError, match="exactly one of input_ids and inputs_embeds, got neither"):
        model()
    with pytest.raises(ValueError, match=r"labels have shape \(1, 4\), the tokens \(1, 5\)"):
        model(ids, labels=ids[:, :4])
    with pytest.raises(ValueError, match=r"tokens have shape \(5,\)"):
        model(ids[0])
    with pytest.raises(ValueError, match=r"output_attentions=True: .*undo"):
        model(ids, output_attentions=True)


WRONG = [
    ({"input_ids": [[1, 2]]}, TypeError, "input_ids is a list: give a tensor"),
    ({"input_ids": torch.ones(2, 5)}, TypeError, "input_ids are torch.float32"),
    ({"input_ids": tokens(2, 5) + 97}, IndexError, "token id .* is outside the vocabulary of 97"),
    ({"inputs_embeds": torch.ones(2, 5, 40)}, ValueError, r"\(2, 5, 40\), the model's .* is 48"),
    ({"inputs_embeds": torch.ones(2, 5, 48).long()}, TypeError, "inputs_embeds are torch.int64"),
    ({"labels": tokens(2, 5).tolist()}, TypeError, "labels are a list"),
    ({"labels": torch.ones(2, 5)}, TypeError, "labels are torch.float32: give token ids"),
    ({"shift_labels": tokens(2, 4)}, ValueError, r"shift_labels have shape \(2, 4\)"),
    ({"position_ids": [[0]]}, TypeError, "position_ids are a list"),
    ({"cu_seq_lens_q": [0, 5, 10]}, TypeError, "cu_seq_lens_q is a list"),
    ({"attention_mask": {"full_attention": 3}}, TypeError, "for attention layers is a int"),
]


@pytest.mark.parametrize(("call", "error", "message"), WRONG, ids=[w[2] for w in WRONG])
def test_arguments_of_another_kind_are_named(plain, call, error, message):
    given = {} if call.keys() & {"input_ids", "inputs_embeds"} else {"input_ids": tokens(2, 5)}
    with pytest.raises(error, match=message):
        accelerated(plain)(**given, **call)
