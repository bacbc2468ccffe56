"""The page of an evaluation: checkpoints side by side, with the figures of its file."""

import math
from pathlib import Path

import pytest

from nemotron_v3.cli import main as cli
from nemotron_v3.evaluation.page import MOST_DOCUMENTS, evaluation_page, write_report
from nemotron_v3.evaluation.result import (
    CheckpointResult,
    Documents,
    Evaluation,
    Places,
    TaskMetric,
    TextResult,
)
from tests.pages.runs import line_of, write_run
from tests.pages.test_page import HOSTILE, chart_of


def text_of(nats: list[float], source: int = 0, **changes) -> TextResult:
    """Documents of 100 tokens and 400 bytes with these nats."""
    count = len(nats)
    told = {
        "source": source,
        "files": ["a.txt"],
        "documents": count,
        "tokens": 100 * count,
        "bytes": 400 * count,
        "nats": sum(nats),
        "first_unscored": 0,
        "left_out": 0,
        "bad": [],
        "per_document": Documents([0] * count, [100] * count, [400] * count, nats),
        "per_place": Places([1, 2, 4, 64], [2, 4, 0, 194], [12.0, 20.0, 0.0, 400.0]),
    }
    return TextResult(**told | changes)


def checkpoint(name: str, texts=(), tasks=()) -> CheckpointResult:
    more = {"texts": list(texts), "tasks": list(tasks), "seconds": 3.5}
    return CheckpointResult(name, f"/{name}", None, "float32", "cpu", 1000, 900, **more)


def write(path: Path, *checkpoints: CheckpointResult) -> Path:
    sources = [{"path": "held out.txt", "format": "auto", "field": "text", "split": "train"}]
    versions = {"torch": "2.11.0"}
    evaluation = Evaluation(sources, list(checkpoints), "2026-01-02", {"window": 64}, versions)
    evaluation.write(path)
    return path


def accuracy(value: float | None, name: str = "acc") -> TaskMetric:
    return TaskMetric("arc", name, "none", value, 0.0123, True, 100, 5, "1")


def test_checkpoints_are_beside_each_other_with_the_figures_of_the_file(tmp_path):
    first, second = text_of([60.0, 80.0]), text_of([50.0, 90.0])
    path = write(
        tmp_path / "eval.json",
        checkpoint("a", [first], [accuracy(0.25), accuracy(12.5, "ppl")]),
        checkpoint("b", [second], [accuracy(0.5)]),
    )
    out = write_report([path])
    assert out == tmp_path / "eval.html"
    text = out.read_text()
    assert "<h1>a / b</h1>" in text
    bars = chart_of(text, "Bits a byte")
    assert bars["names"] == ["held out.txt"]
    assert bars["bars"] == [
        {"name": name, "y": [pytest.approx(140 / math.log(2) / 800, rel=1e-6)]} for name in "ab"
    ]
    assert f'<td class="number">{math.exp(140 / 200):.5g}</td>' in text
    lines = chart_of(text, "Bits a byte by document: held out.txt")["lines"]
    for line, nats in zip(lines, ([60, 80], [50, 90]), strict=True):
        assert line["y"] == pytest.approx([n / math.log(2) / 400 for n in nats], rel=1e-6)
    places = chart_of(text, "Bits a token along a document: held out.txt")["lines"][0]
    assert places["step"] == [1, 2, 64]  # a place of no token has no point
    assert places["y"] == pytest.approx([6 / math.log(2), 5 / math.log(2), 400 / 194 / math.log(2)])
    tasks = chart_of(text, "Tasks")
    assert tasks["names"] == ["arc acc"] and [bar["y"] for bar in tasks["bars"]] == [[0.25], [0.5]]
    assert "0.2500 ± 0.0123" in text and "12.5000" in text and "more is better, 5-shot" in text


def test_what_does_not_compare_is_said(tmp_path):
    bad = [f"a.txt:{i}: not JSON" for i in range(30)]
    path = write(
        tmp_path / "eval.json",
        checkpoint("a", [text_of([60.0], bad=bad, left_out=2, first_unscored=1)]),
        checkpoint("b", [text_of([math.nan], tokens=90)]),
    )
    told = " ".join(evaluation_page([Evaluation.read(path)], [path]).notices)
    for part in ("different tokens", "2 documents with nothing", "first token of 1 document."):
        assert part in told
    for part in ("30 lines are no documents", "and 10 more", "b: the score is not finite"):
        assert part in told
    assert chart_of(write_report([path]).read_text(), "Bits a byte")["bars"][1]["y"] == [None]


def test_documents_that_differ_in_number_are_not_paired(tmp_path):
    path = write(
        tmp_path / "eval.json",
        checkpoint("a", [text_of([60.0, 70.0])]),
        checkpoint("b", [text_of([60.0])]),
    )
    text = write_report([path]).read_text()
    assert len(chart_of(text, "Bits a byte by document: held out.txt: a")["lines"]) == 1
    # A curve of one document would be a point.
    assert "Bits a byte by document: held out.txt: b" not in text
    assert text.count("<td>a.txt #1</td>") == 2


def test_of_many_documents_the_table_holds_those_that_tell_most(tmp_path):
    nats = [[50.0] * 1000, [50.0 + i % 7 for i in range(1000)]]
    nats[1][123] = 99.0
    path = write(
        tmp_path / "eval.json", *(checkpoint(f"c{i}", [text_of(n)]) for i, n in enumerate(nats))
    )
    text = write_report([path]).read_text()
    assert f"{MOST_DOCUMENTS} of 1,000 documents, which the checkpoints differ most on." in text
    assert text.count("<td>a.txt #") == MOST_DOCUMENTS
    assert text.index("<td>a.txt #124</td>") == text.index("<td>a.txt #")
    assert len(chart_of(text, "Bits a byte by document: held out.txt")["lines"][0]["y"]) == 1000


def test_evaluations_of_several_files_are_one_page(tmp_path):
    paths = [
        write(tmp_path / f"{name}.json", checkpoint("same", [text_of([nats])]))
        for name, nats in (("one", 60.0), ("two", 50.0))
    ]
    text = write_report(paths, tmp_path / "both.html").read_text()
    names = [bar["name"] for bar in chart_of(text, "Bits a byte")["bars"]]
    assert names == ["same (one)", "same (two)"]


def test_text_of_an_evaluation_is_text(tmp_path):
    tasks = [TaskMetric(HOSTILE[:-1], HOSTILE[:-1], "none", 0.5, None, None, None, None, None)]
    texts = [text_of([60.0], files=[HOSTILE[:-1]], bad=[HOSTILE[:-1]])]
    path = write(tmp_path / "eval.json", checkpoint(HOSTILE[:-1], texts, tasks))
    text = write_report([path]).read_text()
    assert text.count("<script") == 3 and "<img" not in text


def test_what_is_no_evaluation_is_refused(tmp_path):
    path = tmp_path / "other.json"
    path.write_text("{}")
    with pytest.raises(ValueError, match=r"other.json is no evaluation"):
        write_report([path])
    with pytest.raises(ValueError, match="nothing to report"):
        write_report([])


def test_the_command_takes_runs_or_evaluations(tmp_path, capsys):
    path = write(tmp_path / "eval.json", checkpoint("a", [text_of([60.0])]))
    run = write_run(tmp_path / "run", [line_of(1)])
    for given, page in ((path, tmp_path / "eval.html"), (run, run / "report.html")):
        assert cli.main(["report", str(given)]) == 0
        assert capsys.readouterr().out.strip() == str(page) and page.is_file()
    for given, told in (
        ([path, run], "have pages of their own"),
        ([tmp_path / "nowhere"], "nowhere: no such file or folder"),
        ([], "nothing to report"),
        ([tmp_path], "holds no run"),
    ):
        assert cli.main(["report", *map(str, given)]) == cli.WRONG_CALL
        assert told in capsys.readouterr().err


def test_a_checkpoint_that_was_interrupted_has_a_page_without_its_time(tmp_path):
    resumed = checkpoint("one", [text_of([60.0])])
    resumed.seconds = None
    path = write(tmp_path / "e.json", resumed)
    assert cli.main(["report", str(path)]) == 0
    assert "seconds" in (tmp_path / "e.html").read_text()
