"""Kernels compiled before they are needed: what is called for it, and what stays."""

import sys
from functools import partial

import pytest
import torch

from nemotron_v3.cli.main import main
from nemotron_v3.generation import warm
from nemotron_v3.generation.graphs.compile import at_once, distinct
from nemotron_v3.generation.graphs.graph import graphs_of
from tests.generation.test_graphs import graphed as graphed
from tests.generation.test_graphs import model_of, run


def test_calls_of_one_kind_are_made_once():
    def add(x, y, *, scale=1.0):
        pass

    a, b = torch.zeros(3), torch.ones(3)
    calls = [
        partial(add, a, b),
        partial(add, b, a),  # others of the same shapes
        partial(add, a, b, scale=2.0),
        partial(add, torch.zeros(4), b),
        partial(add, a.double(), b),
        print,
    ]
    assert distinct(calls) == [calls[0], *calls[2:]]


def test_a_call_that_fails_is_told_and_the_others_are_made():
    made = []
    with pytest.raises(ZeroDivisionError):
        at_once([lambda: 1 / 0, lambda: made.append(1)], torch.device("cpu"), 2)
    assert made == [1]


def test_a_generation_finds_its_step(graphed, monkeypatch):
    module = sys.modules["nemotron_v3.generation.warm"]  # whose name the function has
    monkeypatch.setattr(module, "why_not", lambda model: None)
    monkeypatch.setattr(module, "LENGTHS", (3, 40))
    model = model_of("ME*-M")
    before = {name: p.clone() for name, p in model.named_parameters()}
    assert warm(model, (1, 3), threads=2, do_sample=True, top_p=0.9) > 0
    graphs = list(graphs_of(model)._graphs)
    assert [graph.slots.rows for graph in graphs] == [1, 4]
    options = {"max_new_tokens": 5, "eos_token_id": [], "do_sample": True, "seed": 1, "top_p": 0.5}
    mine, expected = (run(model, g, [[1, 2, 3], [4], [5]], **options) for g in ("auto", False))
    assert torch.equal(mine.sequences, expected.sequences)
    assert set(graphs_of(model)._graphs) == set(graphs)
    assert all(torch.equal(before[name], p) for name, p in model.named_parameters())


def test_what_cannot_be_warmed_is_refused():
    with pytest.raises(ValueError, match="an NVIDIA GPU"):
        warm(model_of("M"))


def test_the_verb_needs_a_gpu(capsys):
    if torch.cuda.is_available():
        pytest.skip("there is one")
    assert main(["warm", "nemotron-3-nano-30b"]) == 2
    assert "NVIDIA GPU" in capsys.readouterr().err
