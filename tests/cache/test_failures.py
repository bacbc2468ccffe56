"""A layer that fails with a cache leaves it as it was, or withholds it: never off by a step."""

import copy
from itertools import product

import pytest
import torch

from nemotron_v3 import NemotronHybridCache, ops
from nemotron_v3.layers import NemotronV3Attention, NemotronV3Block, NemotronV3Mamba2Mixer
from tests.models import tiny_config, tiny_model, tokens

CONFIG = tiny_config("M*")
LAYERS = {
    "mamba": NemotronV3Mamba2Mixer(CONFIG, 0),
    "attention": NemotronV3Attention(CONFIG),
    "mamba block": NemotronV3Block(CONFIG, 0),
    "attention block": NemotronV3Block(CONFIG, 1),
}
HELD = [[1, 1, 1, 1, 1], [1, 1, 1, 0, 0]]  # a row of five tokens, one of three


class Failure(RuntimeError):
    """Stands for whatever may go wrong, such as a want of memory."""


def fails(*args, **kwargs):
    raise Failure


def number(kind: str) -> dict[str, int]:
    return {"layer_idx": 1} if kind == "attention" else {}


def x(length: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(2, length, 48, generator=torch.Generator().manual_seed(seed))


def filled(kind: str, **options) -> NemotronHybridCache:
    """A cache that the layer has taken tokens into, one pass after another."""
    config = tiny_config("M" if "mamba" in kind else "-*")
    cache = NemotronHybridCache(config, 2, **options)
    with torch.no_grad():
        LAYERS[kind](x(5), torch.tensor(HELD), past_key_values=cache, **number(kind))
    return cache


def same(a, b) -> bool:
    """Whether two snapshots hold the same."""
    return (a.lengths, a.floors) == (b.lengths, b.floors) and all(
        torch.equal(tensor, b.states[layer].tensors()[name])
        for layer, state in a.states.items()
        for name, tensor in state.tensors().items()
    )


def mixer_of(layer):
    return getattr(layer, "mixer", layer)


def hooked(method: str, module: str):
    """A hook that raises, on the layer's projection, its mixer or its norm."""

    def plant(layer, monkeypatch):
        target = mixer_of(layer) if module == "mixer" else mixer_of(layer).get_submodule(module)
        return getattr(target, method)(fails)

    return plant


def replaced(*names: str):
    def plant(layer, monkeypatch):
        for name in names:
            monkeypatch.setattr(ops, name, fails)

    return plant


def interrupted(layer, monkeypatch):
    def interrupt(*args):
        raise KeyboardInterrupt

    return mixer_of(layer).get_submodule(_out(layer)).register_forward_hook(interrupt)


def _out(layer) -> str:
    return "o_proj" if isinstance(mixer_of(layer), NemotronV3Attention) else "out_proj"


BEFORE = {
    "mamba": [hooked("register_forward_hook", "in_proj"), replaced("mamba2", "mamba2_step")],
    "attention": [
        hooked("register_forward_hook", "v_proj"),
        replaced("cached_attention"),
        hooked("register_forward_pre_hook", "o_proj"),
        hooked("register_forward_hook", "o_proj"),
        interrupted,
    ],
}
WRITTEN = {
    "mamba": [
        hooked("register_forward_pre_hook", "out_proj"),
        hooked("register_forward_hook", "out_proj"),
        interrupted,
    ],
    "mamba block": [
        hooked("register_forward_hook", "out_proj"),
        hooked("register_forward_hook", "mixer"),
    ],
    "attention block": [hooked("register_forward_hook", "mixer")],
}
CASES_BEFORE = [(k, i) for k in LAYERS for i in range(len(BEFORE[k.split()[0]]))]
# One token, lengths that the buffer has room for, and that it has not; without gradients and with.
# (The op for one token without gradients: `test_one_token_is_written_in_place`.)
UNDONE = [
    (*case, length, grad)
    for case, length, grad in product(CASES_BEFORE, (1, 4, 70), (False, True))
    if not ("mamba" in case[0] and case[1] == 1 and length == 1 and not grad)
]
CASES_WRITTEN = [(k, i) for k in WRITTEN for i in range(len(WRITTEN[k]))]


def fail(kind, plant, cache, length, monkeypatch, grad: bool = False) -> None:
    """One call of a copy of the layer with a fault in it."""
    layer = copy.deepcopy(LAYERS[kind])
    with monkeypatch.context() as patched, torch.set_grad_enabled(grad):
        plant(layer, patched)
        with pytest.raises((Failure, KeyboardInterrupt)):
            layer(x(length, seed=1), past_key_values=cache, **number(kind))


@pytest.mark.parametrize(("kind", "fault", "length", "grad"), UNDONE)
def test_what_can_be_undone_is(kind, fault, length, grad, monkeypatch):
    cache, never = filled(kind), filled(kind)
    before = cache.snapshot()
    fail(kind, BEFORE[kind.split()[0]][fault], cache, length, monkeypatch, grad)
    assert cache.lengths == (5, 3) and cache.positions.tolist() == [5, 3]
    assert same(cache.snapshot(), before)
    with torch.no_grad():  # fewer tokens than the failed call had, then another step
        for length in (2, 1):
            again, expected = (
                LAYERS[kind](x(length, seed=2), past_key_values=c, **number(kind))
                for c in (cache, never)
            )
            assert torch.equal(again, expected)
    assert same(cache.snapshot(), never.snapshot())


@pytest.mark.parametrize("length", [1, 4])
@pytest.mark.parametrize(("kind", "fault"), CASES_WRITTEN)
def test_what_cannot_be_undone_withholds_the_cache(kind, fault, length, monkeypatch):
    cache = filled(kind)
    before = cache.snapshot()
    fail(kind, WRITTEN[kind][fault], cache, length, monkeypatch)
    uses = [
        lambda: LAYERS[kind](x(1), past_key_values=cache, **number(kind)),
        cache.snapshot,
        lambda: cache.rollback(1),
    ]
    for use in uses:
        with pytest.raises(RuntimeError, match="a forward pass failed half-way"):
            use()
    cache.restore(before)
    assert same(cache.snapshot(), before)


@pytest.mark.parametrize("kind", ["mamba", "mamba block"])
def test_one_token_is_written_in_place(kind, monkeypatch):
    """Where no gradient is asked for: what the op has written by then is not known."""
    cache = filled(kind)
    before = cache.snapshot()
    fail(kind, replaced("mamba2_step"), cache, 1, monkeypatch)
    with pytest.raises(RuntimeError, match="a forward pass failed half-way"):
        cache.snapshot()
    cache.restore(before)
    assert same(cache.snapshot(), before)


def test_a_rollback_window_that_was_moved_on_withholds_the_cache(monkeypatch):
    cache = filled("mamba", rollback_window=2)
    before = cache.snapshot()
    fail("mamba", replaced("mamba2"), cache, 4, monkeypatch)
    with pytest.raises(RuntimeError, match="a forward pass failed half-way"):
        cache.rollback(1)
    cache.restore(before)
    assert same(cache.snapshot(), before)


@pytest.mark.parametrize("kind", ["mamba", "attention"])
def test_a_graph_that_a_failed_call_meets_stays_whole(kind, monkeypatch):
    gradients = []
    for faulty in (False, True):
        layer = copy.deepcopy(LAYERS[kind])
        cache = NemotronHybridCache(tiny_config("M" if kind == "mamba" else "-*"), 2)
        y = layer(x(5), past_key_values=cache, **number(kind))
        if faulty:
            layer_with_fault = copy.deepcopy(layer)
            hooked("register_forward_hook", _out(layer))(layer_with_fault, monkeypatch)
            with pytest.raises(Failure):
                layer_with_fault(x(3, seed=1), past_key_values=cache, **number(kind))
        z = layer(x(2, seed=2), past_key_values=cache, **number(kind))
        (y.square().sum() + z.square().sum()).backward()
        gradients.append([p.grad for p in layer.parameters() if p.grad is not None])
    assert all(map(torch.equal, *gradients))


@pytest.mark.parametrize("kind", LAYERS)
@pytest.mark.parametrize("shape", [(3, 2, 48), (2, 2, 40), (2, 2, 3, 48)])
def test_wrong_shapes_change_nothing(kind, shape):
    cache = filled(kind)
    before = cache.snapshot()
    with pytest.raises(ValueError):
        LAYERS[kind](torch.randn(shape), past_key_values=cache, **number(kind))
    assert same(cache.snapshot(), before)


@pytest.mark.parametrize(
    ("shape", "layer", "message"),
    [
        ((2, 3, 1, 20), 1, r"keys \(2, 3, 20\) .* \(tokens, 2 heads, 20\)"),
        ((2, 2, 1, 10), 1, r"keys \(2, 2, 10\)"),
        ((2, 2, 1, 20), 0, "layer 0 holds no keys and values"),
        ((2, 2, 1, 20), 7, "layer 7 holds no keys and values"),
        ((3, 2, 1, 20), 1, "3 documents do not fit a cache of 2 rows"),
    ],
)
def test_an_update_that_does_not_fit_changes_nothing(shape, layer, message):
    cache = NemotronHybridCache(tiny_config("M*"), 2)
    keys = torch.randn(shape)
    with pytest.raises(ValueError, match=message):
        cache.update(keys, keys, layer)
    assert cache.lengths == (0, 0)
    fitting = torch.randn(2, 2, 1, 20)
    assert torch.equal(cache.update(fitting, fitting, 1)[0], fitting)


def test_a_model_whose_first_layer_failed_can_go_on(monkeypatch):
    model, ids = tiny_model("-*M"), tokens(2, 9)
    cache = NemotronHybridCache(model.config, 2)
    with torch.no_grad():
        logits = [model(ids[:, :5], past_key_values=cache).logits]
        with monkeypatch.context() as patched, pytest.raises(Failure):
            patched.setattr(ops, "cached_attention", fails)
            model(ids[:, 5:], past_key_values=cache)
        assert cache.withheld is None and cache.lengths == (5, 5)
        logits.append(model(ids[:, 5:], past_key_values=cache).logits)
        expected = model(ids).logits
    assert (torch.cat(logits, 1) - expected).abs().max() <= 1e-5 * expected.abs().max()


@pytest.mark.parametrize("place", ["lm_head", "model.norm_f"])
@pytest.mark.parametrize("labelled", [False, True])
def test_a_head_that_failed_withholds_the_cache(place, labelled, monkeypatch):
    """Want of memory for a long prompt's logits: given again, its tokens would be there twice."""
    model, ids = tiny_model("M*"), tokens(2, 9)
    labels = {"labels": ids} if labelled else {}
    cache = NemotronHybridCache(model.config, 2)
    handle = model.get_submodule(place).register_forward_hook(fails)
    with torch.no_grad():
        with pytest.raises(Failure):
            model(ids, past_key_values=cache, **labels)
        handle.remove()
        with pytest.raises(RuntimeError, match="a forward pass failed half-way"):
            model(ids, past_key_values=cache)


def test_a_label_outside_the_vocabulary_withholds_the_cache():
    model, ids = tiny_model("M*"), tokens(2, 9)
    cache = NemotronHybridCache(model.config, 2)
    with pytest.raises(IndexError, match="outside the vocabulary"):
        model(ids, labels=ids + 97, past_key_values=cache)
    with pytest.raises(RuntimeError, match="a forward pass failed half-way"):
        model(ids, past_key_values=cache)


def test_a_layer_that_missed_a_step_is_refused():
    """A loop over layers that failed between two of them, and is begun again."""
    cache = NemotronHybridCache(CONFIG, 2)
    mixer, attention = LAYERS["mamba"], LAYERS["attention"]
    with torch.no_grad():
        mixer(x(3), past_key_values=cache)
        attention(x(3), past_key_values=cache, layer_idx=1)
        snapshot = cache.snapshot()
        mixer(x(2), past_key_values=cache)  # and then something failed
        mixer(x(2), past_key_values=cache)
        for _ in range(2):
            with pytest.raises(RuntimeError, match="layer 1 was left out of an earlier step"):
                attention(x(2), past_key_values=cache, layer_idx=1)
        cache.finish()
        for other in (cache.select([0, 1]), NemotronHybridCache.cat(cache.split())):
            with pytest.raises(RuntimeError, match="layer 1 was left out of an earlier step"):
                attention(x(2), past_key_values=other, layer_idx=1)
        cache.restore(snapshot)
        attention(x(2), past_key_values=cache, layer_idx=1)
        cache.restore(snapshot)
        assert same(cache.snapshot(), snapshot)
        mixer(x(2), past_key_values=cache)
        mixer(x(2), past_key_values=cache)
        cache.finish()
        for row in (0, 1):
            cache.clear(row)
        attention(x(2), past_key_values=cache, layer_idx=1)
    assert cache.lengths == (2, 2)


def test_a_missed_step_is_remembered_on_disk(tmp_path):
    cache = NemotronHybridCache(CONFIG, 2)
    with torch.no_grad():
        LAYERS["mamba"](x(3), past_key_values=cache)
    cache.finish()
    cache.save(tmp_path / "cache")
    again = NemotronHybridCache(CONFIG, 2)
    again.load(tmp_path / "cache")
    with pytest.raises(RuntimeError, match="layer 1 was left out"):
        LAYERS["attention"](x(1), past_key_values=again, layer_idx=1)
