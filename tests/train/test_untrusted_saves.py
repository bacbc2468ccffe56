"""A run's folder that was changed since: what is wrong is named, and nothing is changed."""

import json
import shutil

import pytest
import torch

from nemotron_v3.train.checkpoints import FOLDER, STATE, saved_steps
from nemotron_v3.train.options import SaveOptions, ScheduleOptions
from nemotron_v3.train.run import train
from tests.train.test_run import SILENT, losses


@pytest.fixture
def asked(options):
    """A run of four steps with two saves, and what it is gone on with."""
    begun = options(save=SaveOptions(every=2), schedule=ScheduleOptions(steps=4))
    train(begun, **SILENT)
    return options(save=SaveOptions(every=2), schedule=ScheduleOptions(steps=6))


def last_save(asked):
    return asked.out / FOLDER / f"step-{saved_steps(asked.out)[-1]:08d}"


def refused(asked, message: str) -> str:
    before = {path: path.read_bytes() for path in asked.out.rglob("*") if path.is_file()}
    with pytest.raises(ValueError, match=message) as error:
        train(asked, resume=True, **SILENT)
    assert {p: p.read_bytes() for p in asked.out.rglob("*") if p.is_file()} == before
    return str(error.value)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"step": 2}, "is of step 2"),
        ({"step": -1}, "is of step -1"),
        ({"step": 4.5}, "progress.step is 4.5: an integer"),
        ({"tokens": "many"}, "progress.tokens is 'many'"),
        ({"tokens": -1}, "counts -1 tokens"),
        ({"seconds": None}, "progress.seconds is None"),
        ({"seconds": float("nan")}, "nan seconds"),
        ({"best_loss": "low"}, "progress.best_loss is 'low'"),
        ({"best_step": 9}, "best_step 9"),
        ({"validated": -2}, "validated -2"),
        ({"data": []}, r"progress.data is \[\]"),
    ],
)
def test_a_value_that_no_run_has_is_refused_by_name(asked, change, message):
    path = last_save(asked) / STATE
    told = json.loads(path.read_text())
    told["progress"] |= change
    path.write_text(json.dumps(told))
    assert "the run goes on from step 2" in refused(asked, message)


@pytest.mark.parametrize("text", ["", "{", "[]", "{}", '{"progress": {}, "identity": {}}'])
def test_what_is_no_state_is_refused_by_name(asked, text):
    (last_save(asked) / STATE).write_text(text)
    assert str(last_save(asked)) in refused(asked, "cannot be gone on from")


def cut(save):
    path = next(save.glob("*.distcp"))
    path.write_bytes(path.read_bytes()[:1000])


DAMAGE = {
    "without its state": lambda save: (save / STATE).unlink(),
    "without its tensors": lambda save: next(save.glob("*.distcp")).unlink(),
    "with half of its tensors": cut,
    "without its table": lambda save: (save / ".metadata").unlink(),
    "with another table": lambda save: (save / ".metadata").write_bytes(b"x"),
}


@pytest.mark.parametrize("name", DAMAGE)
def test_a_damaged_save_is_named_and_the_one_before_goes_on(asked, name):
    DAMAGE[name](last_save(asked))
    assert str(last_save(asked)) in refused(asked, "move it away, and the run goes on from step 2")
    shutil.rmtree(last_save(asked))
    assert train(asked, resume=True, **SILENT).step == 6


def test_no_memory_is_no_damage(asked, monkeypatch):
    def full(*_, **__):
        raise torch.OutOfMemoryError("no memory")

    monkeypatch.setattr("nemotron_v3.train.checkpoints.state_dict_loader.load", full)
    with pytest.raises(torch.OutOfMemoryError):
        train(asked, resume=True, **SILENT)


def test_lines_that_are_none_of_a_run_break_nothing(asked):
    path = asked.out / "metrics.jsonl"
    odd = b'[]\n{"step": "x"}\n{"note": 1}\n\xff\xfe\n{"step": 9}\n{"st'
    path.write_bytes(path.read_bytes() + odd)
    train(asked, resume=True, **SILENT)
    text = path.read_text()
    assert '{"step": "x"}\n{"note": 1}\n' in text and '{"step": 9}' not in text
    path.write_text("\n".join(x for x in text.splitlines() if '"x"' not in x and "note" not in x))
    assert sorted(losses(asked.out)) == [1, 2, 3, 4, 5, 6]


@pytest.mark.parametrize("text", ["{", "{}", "[1]"])
def test_a_list_of_beginnings_that_is_none_is_refused_by_name(asked, text):
    (asked.out / "run.json").write_text(text)
    refused(asked, r"run\.json is no list of JSON objects")
