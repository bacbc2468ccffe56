"""Passes of a step at once: the same numbers, whatever ends first."""

import threading
import time

import pytest
import torch

from nemotron_v3.layers.moe.load_balancing import ExpertLoad
from nemotron_v3.train import passes
from nemotron_v3.train.memory import estimate
from nemotron_v3.train.options import MemoryOptions, OptimizerOptions, ScheduleOptions
from nemotron_v3.train.passes import PassesAtOnce
from nemotron_v3.train.run import train
from tests.models import tiny_model
from tests.train.fakes import made_up_options
from tests.train.test_run import SILENT, losses, same_weights


@pytest.fixture
def two_threads(monkeypatch):
    """A CPU with two, of which this process leaves one alone."""
    monkeypatch.setattr(torch, "get_num_threads", lambda: 2)


@pytest.mark.parametrize("kind", ["adamw", "muon"])
def test_a_run_is_the_same_to_the_bit(options, tmp_path, two_threads, kind, monkeypatch):
    """Of five batches of a step, the first ends last."""
    optimizer = OptimizerOptions(kind=kind, learning_rate=1e-2, balance=1e-3)
    data, schedule = made_up_options(rows=5), ScheduleOptions(steps=4)
    changes = {"optimizer": optimizer, "data": data, "schedule": schedule}
    plain = options(out=tmp_path / "plain", memory=MemoryOptions(), **changes)
    train(plain, **SILENT)
    made, threads = passes._pass, set()

    def slow(model, trained, batch, items):
        threads.add(threading.get_ident())
        told = made(model, trained, batch, items)
        time.sleep(0.03 * (len(threads) == 1))
        return told

    monkeypatch.setattr(passes, "_pass", slow)
    at_once = options(memory=MemoryOptions(passes_at_once=3), **changes)
    train(at_once, **SILENT)
    assert len(threads) == 2
    assert losses(at_once.out) == losses(plain.out)
    assert same_weights(at_once.out, plain.out)


def test_each_gives_results_in_order_and_no_more_are_under_way_than_threads():
    under_way, most = 0, 0
    lock = threading.Lock()

    def wait(n: int) -> int:
        nonlocal under_way, most
        with lock:
            under_way += 1
            most = max(most, under_way)
        time.sleep(0.01 * (3 - n % 3))
        with lock:
            under_way -= 1
        return n * n

    crew = PassesAtOnce(2, 2)
    with crew.sharing():
        assert torch.get_num_threads() == 1 == crew.share
        assert list(crew.each(wait, range(7))) == [n * n for n in range(7)]
    assert most == 2


def test_an_error_comes_out_once_nothing_is_under_way():
    began, ended = threading.Event(), []

    def fail(n: int) -> None:
        if n == 0:
            began.wait()
            raise ArithmeticError("first")
        began.set()
        time.sleep(0.05)
        ended.append(n)

    crew = PassesAtOnce(2, 2)
    with crew.sharing(), pytest.raises(ArithmeticError, match="first"):
        list(crew.each(fail, range(2)))
    assert ended == [1]


def test_a_load_counts_every_token_of_passes_at_once():
    model = tiny_model("EE", dtype=torch.float32).train()
    crew = PassesAtOnce(4, 4)
    with ExpertLoad(model) as load, crew.sharing():
        calls = [torch.zeros(1, 8, dtype=torch.int64)] * 40
        for _ in crew.each(lambda ids: model(ids).logits.sum(), calls):
            pass
        top_k = model.config.num_experts_per_tok
        assert [int(c.sum()) for c in load.counts.values()] == [40 * 8 * top_k] * 2


def test_one_thread_makes_one_pass_at_a_time(options, monkeypatch):
    monkeypatch.setattr(torch, "get_num_threads", lambda: 1)
    monkeypatch.setattr(passes, "PassesAtOnce", None)
    asked = options(memory=MemoryOptions(passes_at_once=2), schedule=ScheduleOptions(steps=1))
    assert train(asked, **SILENT).step == 1


def test_what_it_cannot_be_with_is_refused(options):
    asked = options(memory=MemoryOptions(passes_at_once=2, compile=True))
    with pytest.raises(ValueError, match="passes_at_once is of plain passes"):
        train(asked, **SILENT)

    class World:
        device, size = torch.device("cpu"), 2

    with pytest.raises(ValueError, match="this is 2 processes"):
        passes.passes_at_once(MemoryOptions(passes_at_once=2), World)
    World.device, World.size = torch.device("cuda"), 1
    with pytest.raises(ValueError, match="this is a GPU"):
        passes.passes_at_once(MemoryOptions(passes_at_once=2), World)


def test_the_plan_counts_what_passes_hold(options):
    config = tiny_model("ME*", dtype=torch.float32).config
    one, two, many = (
        estimate(options(memory=MemoryOptions(passes_at_once=n)), config, torch.float32, 1, False)
        for n in (1, 2, 100)
    )
    assert two.activations == 2 * one.activations and two.gradients == 3 * one.gradients
    assert many.activations == 4 * one.activations  # a step has four rows
