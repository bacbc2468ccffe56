"""The JSON of an evaluation."""

import dataclasses
import json
import math

import pytest

from nemotron_v3.evaluation.result import (
    CheckpointResult,
    Documents,
    Evaluation,
    Places,
    TaskMetric,
    TextResult,
)


def evaluation(nats: float = 30.0) -> Evaluation:
    text = TextResult(
        source=0,
        files=["a.txt"],
        documents=2,
        tokens=20,
        bytes=60,
        nats=nats,
        first_unscored=0,
        left_out=1,
        bad=["a.jsonl:3: not JSON"],
        per_document=Documents([0, 0], [5, 15], [10, 50], [nats - 20.0, 20.0]),
        per_place=Places([1, 2], [10, 10], [nats - 10.0, 10.0]),
    )
    task = TaskMetric("arc", "acc", "none", 0.25, math.nan, True, 100, 5, "1.0")
    checkpoint = CheckpointResult(
        "a", "/runs/a", None, "float32", "cpu", 100, 80, 1.5, [text], [task], 10, 50
    )
    return Evaluation([{"path": "a.txt"}], [checkpoint], "2026-01-01T00:00:00Z", {}, {})


def test_what_is_written_is_what_is_read(tmp_path):
    written = evaluation()
    written.checkpoints[0].tasks[0] = dataclasses.replace(
        written.checkpoints[0].tasks[0], stderr=0.5
    )
    written.write(tmp_path / "e.json")
    assert Evaluation.read(tmp_path / "e.json") == written


def test_the_three_figures():
    text = evaluation().checkpoints[0].texts[0]
    assert text.perplexity == pytest.approx(math.exp(1.5))
    assert text.bits_per_token == pytest.approx(1.5 / math.log(2))
    assert text.bits_per_byte == pytest.approx(0.5 / math.log(2))


@pytest.mark.parametrize("nats", [math.nan, math.inf, 1e9])
def test_a_number_that_is_not_finite_is_null(tmp_path, nats):
    evaluation(nats).write(tmp_path / "e.json")
    told = json.loads((tmp_path / "e.json").read_text())  # strict: no NaN, no Infinity
    text = told["checkpoints"][0]["texts"][0]
    assert text["perplexity"] is None and told["checkpoints"][0]["tasks"][0]["stderr"] is None
    read = Evaluation.read(tmp_path / "e.json").checkpoints[0].texts[0]
    assert read.nats == nats if math.isfinite(nats) else math.isnan(read.nats)
    assert read.per_document.nats[1] == 20.0


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("{}", "format is None"),
        ('{"format": "nemotron-v3 evaluation", "version": 99}', "version is 99"),
        ('{"format": "nemotron-v3 evaluation", "version": 1}', "lacks sources"),
        ("[", "e.json"),
    ],
)
def test_a_foreign_file_is_refused_by_name(tmp_path, text, message):
    (tmp_path / "e.json").write_text(text)
    with pytest.raises(ValueError, match=message) as error:
        Evaluation.read(tmp_path / "e.json")
    assert "e.json" in str(error.value)


PLACES = {
    "name of a checkpoint": (("checkpoints", 0, "name"), 5),
    "parameters": (("checkpoints", 0, "parameters"), "x"),
    "source beyond those there are": (("checkpoints", 0, "texts", 0, "source"), 1),
    "source below 0": (("checkpoints", 0, "texts", 0, "source"), -1),
    "documents": (("checkpoints", 0, "texts", 0, "documents"), 3),
    "a list that is text": (("checkpoints", 0, "texts", 0, "bad"), "no"),
    "a column that is text": (("checkpoints", 0, "texts", 0, "per_document", "file"), "xy"),
    "a column with text": (("checkpoints", 0, "texts", 0, "per_document", "bytes"), ["x", 1]),
    "a short column": (("checkpoints", 0, "texts", 0, "per_document", "nats"), [1.0]),
    "a file that is not there": (("checkpoints", 0, "texts", 0, "per_document", "file"), [0, 1]),
    "places that do not rise": (("checkpoints", 0, "texts", 0, "per_place", "starts"), [2, 1]),
    "a place below 0": (("checkpoints", 0, "texts", 0, "per_place", "starts"), [0, 1]),
    "value": (("checkpoints", 0, "tasks", 0, "value"), "high"),
    "higher_is_better": (("checkpoints", 0, "tasks", 0, "higher_is_better"), 1),
    "checkpoints": (("checkpoints",), []),
    "sources": (("sources",), ["a.txt"]),
    "options": (("options",), None),
    "versions": (("versions",), {"torch": 2}),
}


@pytest.mark.parametrize("name", PLACES)
def test_a_value_that_none_can_have_is_refused_with_its_place(tmp_path, name):
    evaluation().write(tmp_path / "e.json")
    told = json.loads((tmp_path / "e.json").read_text())
    (*path, last), value = PLACES[name]
    place = told
    for key in path:
        place = place[key]
    place[last] = value
    (tmp_path / "e.json").write_text(json.dumps(told))
    with pytest.raises(ValueError, match=str(last)) as error:
        Evaluation.read(tmp_path / "e.json")
    assert "e.json" in str(error.value)
