"""A run's folder is read whatever is in it, and what cannot be read is told."""

import json
import math

import pytest

from nemotron_v3.pages.read import read_metrics, read_run
from nemotron_v3.pages.run import run_page
from tests.pages.runs import line_of, write_run


def test_every_number_of_a_name_is_read_with_its_step(tmp_path):
    lines = [line_of(step) for step in range(1, 31)]
    run = read_run(write_run(tmp_path / "run", lines))
    for name in ("loss", "mfu", "gradient_norm/mamba", "experts/entropy/10", "memory_bytes"):
        there = [line for line in lines if name in line]
        column = run.metrics.column(name)
        assert list(column.steps) == [line["step"] for line in there]
        assert list(column.values) == [line[name] for line in there]
    loads = run.metrics.loads["3"]
    assert list(loads.steps) == [1, 10, 20, 30]
    assert list(loads.loads[2]) == lines[19]["experts/load"]["3"]
    assert run.problems == [] and run.config["schedule.steps"] == 100 and run.name == "run"


def test_nan_and_infinity_are_read_and_told(tmp_path):
    lines = [line_of(step) for step in range(1, 13)]
    lines[4]["loss"], lines[7]["loss"] = math.nan, math.inf
    lines[5]["gradient_norm"] = 10**400
    run = read_run(write_run(tmp_path / "run", lines))
    assert math.isnan(run.metrics.column("loss").values[4])
    assert "loss is NaN or infinite at steps 5, 8." in run.problems
    assert "gradient_norm is NaN or infinite at step 6." in run.problems


def test_a_line_that_is_broken_is_left_out_and_told(tmp_path):
    folder = write_run(tmp_path / "run", [line_of(step) for step in range(1, 9)])
    path = folder / "metrics.jsonl"
    texts = path.read_text().splitlines()
    texts[2] = texts[2][:30]
    texts[3] = "[1, 2]"
    texts[4] = json.dumps({"step": 5, "loss": "2.0", "mfu": None, "seconds": True})
    path.write_bytes("\n".join(texts).encode()[:-20])
    run = read_run(folder)
    assert list(run.metrics.column("loss").steps) == [1, 2, 6, 7]
    told = " ".join(run.problems)
    assert "Lines 3, 4 of metrics.jsonl are no JSON object" in told
    assert "The last line of metrics.jsonl is unfinished" in told


def test_bytes_that_are_no_text_and_deep_nesting_break_nothing(tmp_path):
    folder = write_run(tmp_path / "run", [line_of(1)])
    with (folder / "metrics.jsonl").open("ab") as file:
        file.write(b"\xff\xfe\n" + b"[" * 100_000 + b"\n" + b"\n" + b'{"step": 2, "loss": 1.5}\n')
    metrics = read_metrics(folder / "metrics.jsonl")
    assert metrics.broken == [2, 3] and list(metrics.column("loss").values)[1:] == [1.5]


def test_a_run_that_went_back_shows_its_later_lines(tmp_path):
    lines = [line_of(step) for step in (1, 2, 3, 4)] + [line_of(3, loss=9.0), line_of(5)]
    run = read_run(write_run(tmp_path / "run", lines))
    assert list(run.metrics.column("loss").steps) == [1, 2, 3, 5]
    assert run.metrics.column("loss").values[2] == 9.0
    assert any("went back" in told for told in run.problems)


def test_missing_files_and_columns_are_told(tmp_path):
    lines = [{"step": 1, "loss": 3.0}, {"step": 2, "loss": 2.5}]
    folder = write_run(tmp_path / "run", lines)
    (folder / "train.toml").unlink()
    (folder / "run.json").write_text("{}")
    page = run_page(read_run(folder))
    told = " ".join([*page.notices, *page.missing])
    missing = ("learning rate", "gradient norm", "tokens", "speed", "MFU", "validation")
    for what in ("train.toml is missing", "run.json is no list", "by kind of block"):
        assert what in told
    assert [name for name in missing if f"No {name}" not in told] == []
    (folder / "train.toml").write_text("= nothing")
    assert any("no TOML" in told for told in read_run(folder).problems)
    (folder / "metrics.jsonl").write_text("")
    page = run_page(read_run(folder))
    assert "no line of a step yet" in " ".join(page.notices) and not page.tabs[0].blocks


def test_a_folder_without_a_run_is_an_error(tmp_path):
    with pytest.raises(ValueError, match="holds no run"):
        read_run(tmp_path)


def test_integers_beyond_64_bits_are_told_wherever_they_stand(tmp_path):
    lines = [line_of(step) for step in range(1, 13)]
    lines[9]["experts/load"]["3"][0] = 10**400
    lines.append({"bits": {"a": 10**400, "b": 10**30}})
    run = read_run(write_run(tmp_path / "run", lines))
    assert run.metrics.loads["3"].loads[-1][0] == math.inf
    assert run.metrics.whole["bits"] == {"a": math.inf, "b": 1e30}
    run_page(run)
