"""The printer and the measuring, on made-up work."""

import json

import pytest

from benchmarks import __main__ as command
from benchmarks import measure
from benchmarks.table import OOM, Row, render, to_json, unavailable

ROWS = [
    Row("step", "1 x 8", "tokens/s", 3000.0, {"other": 1000.0}, floor=4000.0),
    Row("step", "1 x 8", "GiB", 0.5, {"other": 2.0}, more_is_better=False),
    Row("step", "1 x 9", "tokens/s", 5.0, {"other": OOM}),
    Row("decode", "1 x 1", "tokens/s", unavailable("not built"), {"third": 7.25}),
]


def test_a_ratio_says_how_many_times_better_we_are_whatever_the_unit():
    assert [row.ratio("other") for row in ROWS] == [3.0, 4.0, None, None]
    assert ROWS[0].percent_of_floor() == 75.0
    assert Row("w", "s", "us", 50.0, more_is_better=False, floor=40.0).percent_of_floor() == 80.0


def test_the_table():
    assert render(ROWS, {"machine": "a box"}).splitlines() == [
        "machine: a box",
        "",
        "work    shape  unit                ours  other  ratio  third  ratio  % of floor",
        "------  -----  --------  --------------  -----  -----  -----  -----  ----------",
        "step    1 x 8  tokens/s           3,000  1,000  3.00x                        75",
        "step    1 x 8  GiB                  0.5      2  4.00x",
        "step    1 x 9  tokens/s               5    OOM",
        "decode  1 x 1  tokens/s  n/a: not built                 7.25",
    ]


def test_the_json_is_one_line_with_everything():
    line = to_json(ROWS, {"commit": "abc"})
    assert "\n" not in line
    read = json.loads(line)
    assert read["machine"] == {"commit": "abc"}
    assert [row["ours"] for row in read["rows"]] == [3000.0, 0.5, 5.0, "n/a: not built"]
    assert read["rows"][0]["ratios"] == {"other": 3.0}


def test_variants_are_warmed_up_and_take_turns():
    calls = []
    seconds = iter(range(1000))
    timings = measure.alternate(
        {"a": lambda: calls.append("a"), "b": lambda: calls.append("b")},
        repeats=3,
        clock=lambda: float(next(seconds)),
    )
    assert calls == ["a", "b"] * 4
    assert timings == {"a": 1.0, "b": 1.0}


def hold(mebibytes: int) -> None:
    bytearray(mebibytes * 2**20)


def fail(message: str) -> None:
    raise ValueError(message)


def die() -> None:
    import os
    import signal

    os.kill(os.getpid(), signal.SIGKILL)


def test_peak_memory_is_that_of_a_process_of_its_own():
    small, large = (measure.peak_memory("tests.benchmarks.test_table:hold", n) for n in (1, 301))
    assert large - small == pytest.approx(300 / 1024, abs=0.02)


def test_a_process_that_fails_is_a_row():
    module = "tests.benchmarks.test_table"
    assert measure.peak_memory(f"{module}:fail", "too odd") == "n/a: ValueError: too odd"
    assert measure.peak_memory(f"{module}:die") == OOM


def test_a_run_prints_the_table_and_keeps_the_json(monkeypatch, tmp_path, capsys):
    class Suite:
        rows = staticmethod(lambda: iter(ROWS))

    monkeypatch.setattr(command.importlib, "import_module", lambda name: Suite)
    command.run("cpu", tmp_path)
    printed = capsys.readouterr().out.splitlines()
    (written,) = tmp_path.glob("cpu-*.json")
    assert json.loads(printed[-1]) == json.loads(written.read_text())
    assert any(line.startswith("work ") for line in printed)


def test_an_unknown_suite_is_refused(capsys):
    with pytest.raises(SystemExit):
        command.main(["gpu9"])
    assert "unknown suite 'gpu9': choose from attention_gpu, cpu" in capsys.readouterr().err
