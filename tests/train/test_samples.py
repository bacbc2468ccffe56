"""What a model in training writes: at its validations and its end, and without touching the run."""

import json
import os
from dataclasses import replace

import pytest
from rich.console import Console
from torch.distributed.fsdp import FSDPModule

from nemotron_v3 import from_pretrained
from nemotron_v3.cli.train import _write_on
from nemotron_v3.data.tokenizer import Tokenizer
from nemotron_v3.generation import generate
from nemotron_v3.train.display import Display
from nemotron_v3.train.options import (
    LogOptions,
    PlanOptions,
    ScheduleOptions,
    ValidationOptions,
)
from nemotron_v3.train.run import train
from nemotron_v3.train.samples import Samples
from nemotron_v3.train.tokenizer import read_tokenizer
from tests.train.fakes import MadeUp
from tests.train.launch import finish, start

LOG = LogOptions(samples=("counting", "down"), sample_tokens=5)


@pytest.fixture
def tokenizer(base):
    return Tokenizer.load(base)


def run(options, tokenizer, **changes):
    """Train, with what the user was told; gives the losses, the samples, and that."""
    console = Console(record=True, width=200, file=open(os.devnull, "w"))  # noqa: SIM115
    more = {"make_data": MadeUp, "display": Display(console), "write_on": _write_on}
    train(options, tokenizer=tokenizer, **more | changes)
    lines = [json.loads(line) for line in (options.out / "metrics.jsonl").read_text().splitlines()]
    path = options.out / "samples.jsonl"
    texts = path.read_text().splitlines() if path.exists() else []
    losses = [line["loss"] for line in lines if "loss" in line]
    return losses, [json.loads(line) for line in texts], console.export_text()


def test_prompts_are_continued_and_the_run_is_as_without_them(options, tokenizer, tmp_path):
    every = {"validation": ValidationOptions(every=3), "schedule": ScheduleOptions(steps=8)}
    plain, none, _ = run(options(out=tmp_path / "plain", **every), tokenizer)
    losses, samples, _ = run(options(log=LOG, **every), tokenizer)
    assert losses == plain and none == []
    assert [(s["step"], s["prompt"]) for s in samples] == [
        (step, prompt) for step in (3, 6, 8) for prompt in LOG.samples
    ]
    # The last ones are those of the checkpoint that it left.
    model = from_pretrained(tmp_path / "run").eval()
    more = {"max_new_tokens": 5, "tokenizer": tokenizer, "do_sample": False}
    for sample in samples[-2:]:
        assert sample["text"] == generate(model, sample["prompt"], **more).text[0]
    page = (tmp_path / "run" / "report.html").read_text()
    assert page.count("<h3>Sample, step 8</h3>") == 2


def test_a_resumed_run_has_each_sample_once(options, tokenizer):
    class Crash(Exception):
        pass

    def crash(step):
        if step.step == 5:
            raise Crash

    asked = options(log=LOG, validation=ValidationOptions(every=2))
    with pytest.raises(Crash):
        run(asked, tokenizer, after_step=crash)
    with (asked.out / "samples.jsonl").open("a") as file:
        file.write('{"step": 4, "text": "half of a li')
    # The last save was after step 3.
    _, samples, _ = run(asked, tokenizer, resume=True)
    assert [s["step"] for s in samples] == [2, 2, 4, 4, 6, 6, 8, 8]


def test_what_fails_there_is_told_and_ends_nothing(options, tokenizer):
    def fail(*_):
        raise FloatingPointError("row 0 has logits that are NaN")

    losses, samples, told = run(options(log=LOG), tokenizer, write_on=fail)
    assert len(losses) == 8 and samples == []
    assert "no samples: FloatingPointError: row 0 has logits that are NaN" in told


def test_samples_that_nobody_can_write_are_refused_before_anything_is_written(options, tokenizer):
    asked = options(log=LOG)
    with pytest.raises(ValueError, match=r"log.samples need somebody who continues prompts"):
        run(asked, tokenizer, write_on=None)
    with pytest.raises(ValueError, match=r"log.sample_tokens is 0: give a positive number"):
        replace(asked, log=LogOptions(sample_tokens=0)).check()
    assert not asked.out.exists()


@pytest.fixture
def spread(base):
    """A model that says it is spread over processes, and is whole."""
    model = from_pretrained(base).eval()
    kind = type(model)
    model.__class__ = type("Spread", (kind, FSDPModule), {"__new__": kind.__new__})
    return model


def test_a_spread_model_is_called_equally_often_whatever_ends_a_text(spread, base, tokenizer):
    plain = from_pretrained(base).eval()
    more = {"max_new_tokens": 12, "tokenizer": tokenizer}
    whole = generate(plain, "counting", eos_token_id=[], **more)
    calls = []
    spread.register_forward_hook(lambda *_: calls.append(1))
    for model in (plain, spread):
        model.generation_config = {"eos_token_id": int(whole.sequences[0, -6])}
    texts = _write_on(spread, ["counting"], 12, tokenizer)
    assert texts == _write_on(plain, ["counting"], 12, tokenizer)
    assert whole.text[0].startswith(texts[0]) and len(texts[0]) < len(whole.text[0])
    assert len(calls) == 12


def test_of_several_processes_one_writes_and_an_error_of_one_alone_is_not_passed_over(
    spread, base, tmp_path
):
    said = []

    def made(model, write_on, first):
        samples = Samples(tmp_path, LOG, write_on, None, said.append, first)
        samples.open(0)
        samples.take(model, 1)
        samples.close()
        return (tmp_path / "samples.jsonl").exists()

    def write(model, prompts, *_):
        said.append("written")
        return ["" for _ in prompts]

    def raising(error):
        def write_on(*_):
            raise error

        return write_on

    copy = from_pretrained(base)
    assert not made(copy, write, first=False) and said == []
    assert not made(spread, write, first=False) and said == ["written"]
    made(spread, raising(ValueError("the prompt is empty")), first=False)
    assert said[1:] == ["step 1  no samples: ValueError: the prompt is empty"]
    with pytest.raises(RuntimeError, match="no memory"):
        made(spread, raising(RuntimeError("no memory")), first=False)
    assert made(copy, raising(RuntimeError("no memory")), first=True)
    assert said[2:] == ["step 1  no samples: RuntimeError: no memory"]


@pytest.mark.integration
@pytest.mark.skipif(not hasattr(os, "fork"), reason="needs fork")
@pytest.mark.parametrize(("parallel", "ep"), [("ddp", 1), ("fsdp", 1), ("fsdp", 2)])
def test_several_processes_write_what_their_checkpoint_does(options, parallel, ep):
    asked = options(
        log=LOG, parallel=parallel, plan=PlanOptions(ep=ep), schedule=ScheduleOptions(steps=4),
        validation=ValidationOptions(every=2),
    )  # fmt: skip
    ended = finish(start(asked, 2))
    assert [status for status, _ in ended] == [0, 0], ended
    texts = (asked.out / "samples.jsonl").read_text().splitlines()
    samples = [json.loads(line) for line in texts]
    assert [(s["step"], s["prompt"]) for s in samples] == [
        (step, prompt) for step in (2, 4) for prompt in LOG.samples
    ]
    model = from_pretrained(asked.out).eval()
    written = _write_on(model, LOG.samples, 5, read_tokenizer(asked))
    assert [s["text"] for s in samples[2:]] == written
