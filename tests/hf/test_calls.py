"""Hooks, wrappers and another `forward` on what an accelerated mixer's op does the work of."""

import pytest
import torch
from torch import nn
from torch.nn.modules.module import register_module_forward_hook

from tests.hf.models import accelerated, close, tokens, transformers_model

IDS = tokens(2, 9)


class Doubled(nn.Module):
    def __init__(self, inner: nn.Module):
        super().__init__()
        self.inner = inner

    def forward(self, *args):
        return self.inner(*args) * 2


def by_a_hook(mixer, name):
    getattr(mixer, name).register_forward_hook(lambda module, args, out: out * 2)


def by_a_wrapper(mixer, name):
    setattr(mixer, name, Doubled(getattr(mixer, name)))


def by_a_forward(mixer, name):
    module = getattr(mixer, name)
    before = module.forward
    module.forward = lambda *args: before(*args) * 2


def changed(model, way, name):
    for block in model.model.layers:
        if hasattr(block.mixer, "conv1d"):
            way(block.mixer, name)
    return model


def by_parameters(mixer, name):
    for parameter in getattr(mixer, name).parameters():
        parameter.mul_(2)


@torch.no_grad()
@pytest.mark.parametrize("name", ["conv1d", "norm"])
@pytest.mark.parametrize("way", [by_a_hook, by_a_wrapper, by_a_forward])
def test_what_is_put_on_a_convolution_or_a_norm_acts(way, name):
    """A plain model, which does not call its convolution either, gives the numbers by weights."""
    plain = transformers_model().eval()
    before = accelerated(plain)(IDS).logits
    model = changed(accelerated(plain), way, name)
    expected = changed(plain, by_parameters, name)(IDS, use_cache=False).logits
    assert not close(before, expected)
    assert close(model(IDS, use_cache=False).logits, expected)
    out = model(IDS[:, :6], use_cache=True)
    logits = [out.logits]
    for t in range(6, 9):
        out = model(IDS[:, t : t + 1], past_key_values=out.past_key_values)
        logits.append(out.logits)
    assert close(torch.cat(logits, 1), expected)


def test_a_hook_on_all_modules_sees_them():
    model, seen = accelerated(transformers_model()), []
    handle = register_module_forward_hook(lambda module, args, out: seen.append(module))
    try:
        model(IDS, labels=IDS).loss.backward()
    finally:
        handle.remove()
    unseen = {type(m).__name__ for m in model.modules() if m not in seen}
    assert unseen == {"ModuleList"}


@torch.no_grad()
@pytest.mark.parametrize("way", [by_a_hook, by_a_wrapper, by_a_forward])
def test_what_is_put_on_an_activation_acts(way):
    """An op does its work otherwise; transformers' own modules call it, and give the numbers."""
    plain = transformers_model().eval()
    model = accelerated(plain)
    before = model(IDS).logits
    put = 0
    for each in (model, plain):
        for module in list(each.modules()):
            for name in {"act_fn"} & set(dict(module.named_children())):
                way(module, name)
                put += each is model
    assert put >= 3  # of an mlp, experts and shared experts
    expected = plain(IDS, use_cache=False).logits
    assert not close(before, expected)
    assert close(model(IDS, use_cache=False).logits, expected)
    out = model(IDS[:, :6], use_cache=True)
    for t in range(6, 9):
        out = model(IDS[:, t : t + 1], past_key_values=out.past_key_values)
        assert close(out.logits[:, 0], expected[:, t])
