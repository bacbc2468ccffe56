"""A model that changes while a stream over it is open: the next token is the changed model's."""

import pytest
import torch
from torch import nn

from nemotron_v3 import NemotronHybridCache
from nemotron_v3.generation import engine
from tests.models import tiny_model, tokens

IDS = tokens(1, 7)


def made():
    return tiny_model("ME*-M").eval().requires_grad_(False)


def in_place(model):
    model.lm_head.weight.mul_(-1)


def past_autograd(model):
    model.model.layers[2].mixer.v_proj.weight.data.mul_(-30)


def other_parameter(model):
    model.lm_head.weight = nn.Parameter(-model.lm_head.weight, requires_grad=False)


def other_data(model):
    mixer = model.model.layers[0].mixer
    mixer.A_log.data, mixer.D.data = mixer.A_log.data + 2, -3 * mixer.D.data


def other_module(model):
    rows, width = model.lm_head.weight.shape
    head = nn.Linear(width, rows, bias=False)
    head.weight.data = -model.lm_head.weight.data
    model.lm_head = head.requires_grad_(False)


def hook(model):
    model.lm_head.register_forward_hook(lambda module, inputs, output: -output)


def experts(model):
    model.model.layers[1].mixer.experts.up_proj.mul_(-30)


CHANGES = [in_place, past_autograd, other_parameter, other_data, other_module, hook, experts]


def by_forward(change, count=8, at=3):
    model = made()
    cache = NemotronHybridCache(model.config, 1)
    found, logits = [], model(IDS, past_key_values=cache).logits[:, -1:]
    for number in range(1, count + 1):
        found.append(logits.argmax(-1))
        if number == at:
            change(model)
        logits = model(found[-1], past_key_values=cache).logits
    return [token.item() for token in found]


def counted(monkeypatch):
    """The lean steps that are made from now on."""
    steps, lean = [], engine.DecodeStep

    def make(*args):
        steps.append(lean(*args))
        return steps[-1]

    make.fits = lean.fits
    monkeypatch.setattr(engine, "DecodeStep", make)
    return steps


@pytest.mark.parametrize("change", CHANGES)
@torch.no_grad()
def test_the_next_token_is_the_changed_models(change, monkeypatch):
    steps, model, found = counted(monkeypatch), made(), []
    for token in model.stream(IDS, max_new_tokens=8, eos_token_id=[]):
        found.append(token.token_id)
        if len(found) == 3:
            change(model)
    assert found == by_forward(change) != by_forward(lambda model: None)
    assert len(steps) == (1 if change is hook else 2)


@torch.no_grad()
def test_a_model_that_stays_keeps_its_step(monkeypatch):
    steps, model = counted(monkeypatch), made()
    model.model.embeddings.weight[90] = float("nan")  # of a token that does not come
    assert len(list(model.stream(IDS, max_new_tokens=6, eos_token_id=[]))) == 6
    assert len(steps) == 1


@torch.no_grad()
def test_another_dtype_is_refused():
    model = made()
    stream = model.stream(IDS, max_new_tokens=6, eos_token_id=[])
    next(stream)
    model.double()
    with pytest.raises(ValueError, match="make the cache with the model's dtype"):
        list(stream)
