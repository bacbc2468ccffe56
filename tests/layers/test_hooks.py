"""Hooks, wrappers and another `forward` act on modules whose weights others read."""

from collections import Counter
from contextlib import contextmanager
from functools import partial

import pytest
import torch
from torch import nn
from torch.nn.modules.module import (
    register_module_forward_hook,
    register_module_forward_pre_hook,
    register_module_full_backward_hook,
)
from torch.nn.utils import prune

from nemotron_v3 import NemotronHybridCache, ops
from nemotron_v3.layers import NemotronV3Mamba2Mixer, NemotronV3MLP
from nemotron_v3.layers.hooks import must_call
from nemotron_v3.layers.mamba2_by_modules import mamba2_by_modules
from nemotron_v3.ops.mamba2 import cases as mamba2_cases
from nemotron_v3.ops.mamba2.reference import mamba2 as mamba2_reference
from tests.accuracy import PlainPyTorch, check
from tests.models import tiny_config, tiny_model, tokens

IDS = tokens(2, 9)
PARTS = ("conv1d", "norm")


def double(y):
    return tuple(map(double, y)) if isinstance(y, tuple) else y * 2


class Doubled(nn.Module):
    """Another module in the place of one, with none of its attributes."""

    def __init__(self, inner: nn.Module):
        super().__init__()
        self.inner = inner

    def forward(self, *args):
        return double(self.inner(*args))


class DoublingConv(nn.Conv1d):
    def forward(self, x):
        return double(super().forward(x))


def by_a_hook(mixer, name):
    getattr(mixer, name).register_forward_hook(lambda module, args, out: double(out))


def by_a_wrapper(mixer, name):
    setattr(mixer, name, Doubled(getattr(mixer, name)))


def by_a_forward(mixer, name):
    module = getattr(mixer, name)
    before = module.forward
    module.forward = lambda *args: double(before(*args))


def by_a_subclass(mixer, name):
    module = getattr(mixer, name)
    module.__class__ = type("Doubling", (type(module),), {"forward": _doubling(type(module))})


def _doubling(kind):
    return lambda self, *args: double(kind.forward(self, *args))


WAYS = [by_a_hook, by_a_wrapper, by_a_forward, by_a_subclass]


def mixers(model):
    return [b.mixer for b in model.model.layers if b.block_type == "mamba"]


def doubled_weights(name):
    """A model whose convolutions (or norms) give twice what they gave, by their parameters."""
    model = tiny_model().double()
    with torch.no_grad():
        for mixer in mixers(model):
            for parameter in getattr(mixer, name).parameters():
                parameter.mul_(2)
    return model


def changed(way, name):
    model = tiny_model().double()
    for mixer in mixers(model):
        way(mixer, name)
    return model


@pytest.mark.parametrize("name", PARTS)
@pytest.mark.parametrize("way", WAYS)
def test_what_is_put_on_a_convolution_or_a_norm_acts(way, name):
    model, same = changed(way, name), doubled_weights(name)
    mask = torch.ones(2, 9)
    mask[1, :4] = 0
    torch.testing.assert_close(model(IDS).logits, same(IDS).logits)
    torch.testing.assert_close(
        model(IDS, attention_mask=mask).logits, same(IDS, attention_mask=mask).logits
    )
    out = model.generate(IDS, max_new_tokens=4, eos_token_id=[], return_logprobs=True)
    expected = same.generate(IDS, max_new_tokens=4, eos_token_id=[], return_logprobs=True)
    assert torch.equal(out.sequences, expected.sequences)
    torch.testing.assert_close(out.logprobs, expected.logprobs)


@pytest.mark.parametrize("name", PARTS)
def test_a_pre_hook_sees_and_changes_the_arguments(name):
    model = tiny_model().double().eval()
    before, seen = model(IDS).logits, []

    def twice(module, args):
        seen.append([tuple(a.shape) for a in args])
        return tuple(a * 2 for a in args)

    mixer = mixers(model)[0]
    getattr(mixer, name).register_forward_pre_hook(twice)
    assert not torch.allclose(model(IDS).logits, before)
    shapes = {"conv1d": [(2, 124, 9)], "norm": [(18, 60), (18, 60)]}
    assert seen == [shapes[name]]


def test_gradients_go_through_modules_that_are_called():
    model, same = (tiny_model().double() for _ in range(2))
    for mixer in mixers(model):
        mixer.conv1d.register_forward_hook(lambda module, args, out: None)
        mixer.norm.register_full_backward_hook(lambda module, before, after: None)
    model(IDS, labels=IDS).loss.backward()
    same(IDS, labels=IDS).loss.backward()
    for (name, mine), (_, theirs) in zip(
        model.named_parameters(), same.named_parameters(), strict=True
    ):
        torch.testing.assert_close(mine.grad, theirs.grad, msg=name)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("case", mamba2_cases.CASES, ids=lambda case: case.name)
def test_the_core_by_modules_is_as_exact_as_the_fused_one(case, dtype):
    def function(conv_weight, conv_bias, norm_weight, eps, **arguments):
        channels, taps = conv_weight.shape

        def conv1d(x):
            return nn.functional.conv1d(
                x, conv_weight[:, None], conv_bias, padding=taps - 1, groups=channels
            )

        def norm(y, z):
            return ops.gated_rms_norm(y, z, norm_weight, case.inner // case.groups, eps)

        results = mamba2_by_modules(conv1d=conv1d, norm=norm, taps=taps, **arguments)
        return dict(zip(("y", "conv_states", "ssm_states"), results, strict=True))

    def truth(**arguments):
        results = mamba2_reference(**arguments)
        return dict(zip(("y", "conv_states", "ssm_states"), results, strict=True))

    check(
        function,
        truth,
        lambda generator: mamba2_cases.make_inputs(case, dtype, "cpu", generator),
        dtype=dtype,
        plain=PlainPyTorch(partial(truth, activation_dtype=dtype), dtype, results=True),
        long_decay=case.decay == "long",
    )


def test_what_is_passed_by_is_a_plain_module_that_nobody_looks_into():
    conv = nn.Conv1d(2, 2, 3)
    assert not must_call(conv, nn.Conv1d)
    assert must_call(nn.Conv2d(2, 2, 3), nn.Conv1d)
    assert must_call(DoublingConv(2, 2, 3), nn.Conv1d)
    nn.utils.parametrizations.weight_norm(conv)
    assert must_call(conv, nn.Conv1d)


def test_a_parametrized_and_a_pruned_convolution_compute_what_they_say():
    mixer = NemotronV3Mamba2Mixer(tiny_config(), 0).double()
    x = torch.randn(2, 7, 48, dtype=torch.float64)
    prune.random_unstructured(mixer.conv1d, "weight", amount=0.5)
    pruned = mixer(x)
    pruned.sum().backward()
    mixer(x).sum().backward()  # the mask is applied anew at each call
    prune.remove(mixer.conv1d, "weight")
    torch.testing.assert_close(mixer(x), pruned)
    mixer = NemotronV3Mamba2Mixer(tiny_config(), 0).double()
    nn.utils.parametrizations.weight_norm(mixer.conv1d)
    mixer.conv1d.parametrizations.weight.original0.data.mul_(2)
    twice = NemotronV3Mamba2Mixer(tiny_config(), 0).double()
    state = {k: v for k, v in mixer.state_dict().items() if "parametrizations" not in k}
    twice.load_state_dict(state | {"conv1d.weight": mixer.conv1d.weight})
    torch.testing.assert_close(mixer(x), twice(x))


@torch.no_grad()
def test_one_pass_is_many_steps_where_modules_are_called():
    mixer = NemotronV3Mamba2Mixer(tiny_config(), 0).double()
    by_a_hook(mixer, "conv1d")
    by_a_hook(mixer, "norm")
    x = torch.randn(2, 9, 48, dtype=torch.float64)
    whole = mixer(x)
    cache = NemotronHybridCache(tiny_config(), 2, torch.float64)
    parts = [mixer(part, past_key_values=cache) for part in x.split([5, 1, 1, 2], 1)]
    torch.testing.assert_close(torch.cat(parts, 1), whole)


# --- hooks on all modules -------------------------------------------------------------------------


@contextmanager
def seen(register):
    calls = Counter()
    handle = register(lambda module, *_: calls.update([module]))
    try:
        yield calls
    finally:
        handle.remove()


GLOBAL = [register_module_forward_hook, register_module_forward_pre_hook]


@pytest.mark.parametrize("register", GLOBAL)
def test_hooks_on_all_modules_see_each_of_them_in_every_pass(register):
    model = tiny_model()
    leaves = [m for m in model.modules() if "forward" in vars(type(m)) and m is not model]
    with seen(register) as calls:
        model(IDS)
    assert {calls[m] for m in leaves} == {1}
    with seen(register) as calls:
        model.eval().generate(IDS, max_new_tokens=5, eos_token_id=[])
    assert {calls[m] for m in leaves} == {5}
    with seen(register) as calls:
        list(model.stream(IDS[0].tolist(), max_new_tokens=5, eos_token_id=[]))
    assert {calls[m] for m in leaves} == {5}
    with seen(register) as calls:
        model.score(IDS)
    assert {calls[m] for m in leaves} == {1}


def test_hooks_on_all_modules_see_the_head_in_training():
    model, same = tiny_model(), tiny_model()
    with seen(register_module_forward_hook) as calls:
        loss = model(IDS, labels=IDS).loss
    assert calls[model.lm_head] == 1
    torch.testing.assert_close(loss, same(IDS, labels=IDS).loss)
    with seen(register_module_full_backward_hook) as calls:
        model(IDS, labels=IDS).loss.backward()
    assert {calls[m] for m in (model.lm_head, mixers(model)[0].conv1d)} == {1}


def test_a_hook_that_casts_is_given_what_the_layer_alone_refuses():
    mlp = NemotronV3MLP(48, 32)
    x = torch.randn(3, 48, dtype=torch.float64)
    with pytest.raises(TypeError, match=r"hidden states are torch\.float64, the layer's weights"):
        mlp(x)
    mlp.up_proj.register_forward_pre_hook(lambda module, args: (args[0].float(),))
    assert torch.equal(mlp(x), mlp(x.float()))


@pytest.mark.parametrize("kind", ["M", "*", "E", "-", "model"])
def test_what_a_subclass_adds_is_done_once_where_it_is_called_alone(kind):
    """Called alone it enters, and goes on with a context: past the subclass, not through it."""
    model = tiny_model("M" if kind == "model" else kind).model
    part = model if kind == "model" else model.layers[0]
    x = IDS if kind == "model" else torch.randn(2, 9, 48)
    for module in (part,) if kind == "model" else (part, part.mixer):
        before, calls, base = module(x), [], type(module)

        def forward(self, *args, base=base, calls=calls, **kwargs):
            calls.append(1)
            return base.forward(self, *args, **kwargs)

        module.__class__ = type("Counting", (base,), {"forward": forward})
        after = module(x)
        if kind == "model":
            before, after = before.last_hidden_state, after.last_hidden_state
        assert torch.equal(after, before) and calls == [1]
