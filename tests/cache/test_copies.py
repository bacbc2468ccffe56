"""Copies by Python's own means are caches of their own."""

import copy
import pickle

import pytest
import torch

from nemotron_v3 import NemotronHybridCache
from tests.models import tiny_model, tokens

MODEL = tiny_model("M*-M").eval()
IDS = tokens(2, 9)


def held(*, grad=False):
    cache = NemotronHybridCache(MODEL.config, 2, rollback_window=2)
    with torch.set_grad_enabled(grad):
        MODEL(IDS[:, :7], past_key_values=cache)
    return cache


def following(cache):
    return MODEL(IDS[:, 7:8], past_key_values=cache).logits


def through_pickle(cache):
    return pickle.loads(pickle.dumps(cache))


@pytest.mark.parametrize("copied", [copy.copy, copy.deepcopy, through_pickle])
@torch.no_grad()
def test_neither_sees_what_the_other_does(copied):
    cache = held()
    other, want = copied(cache), following(held())
    following(cache)
    cache.rollback(2)
    assert other.lengths == (7, 7) and cache.lengths == (6, 6)
    assert torch.equal(following(other), want)
    assert other.positions.tolist() == [8, 8] and cache.positions.tolist() == [6, 6]


@pytest.mark.parametrize("copied", [copy.copy, copy.deepcopy])
def test_a_copy_of_states_with_a_graph_is_part_of_it(copied):
    def gradient(cache):
        MODEL.zero_grad()
        following(cache).square().sum().backward()
        return MODEL.model.layers[0].mixer.in_proj.weight.grad.clone()

    want = gradient(held(grad=True))
    assert torch.equal(gradient(copied(held(grad=True))), want)


def test_an_object_that_holds_a_cache_twice_holds_its_copy_twice():
    cache = held()
    first, second = copy.deepcopy([cache, cache])
    assert first is second and first is not cache


def test_a_withheld_cache_is_not_copied():
    cache = held()
    cache.withhold("for a reason")
    with pytest.raises(RuntimeError, match="for a reason"):
        copy.copy(cache)


@pytest.mark.parametrize("rows", [None, slice(0, 1), object()])
def test_rows_that_are_no_numbers(rows):
    cache = held()
    for name, call in (("rows", cache.select), ("beam_idx", cache.reorder_cache)):
        with pytest.raises(TypeError, match=f"{name} are .*: give numbers"):
            call(rows)
    assert cache.lengths == (7, 7) and cache.withheld is None
