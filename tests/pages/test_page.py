"""A page is one file that holds its numbers, fetches nothing, and takes text as text."""

import base64
import gzip
import json
import re

import pytest

from nemotron_v3.pages import write_report
from nemotron_v3.pages.read import read_run
from nemotron_v3.pages.run import run_page
from tests.pages.runs import line_of, write_run

HOSTILE = "</script><script>fetch('http://evil.example/')</script><img src=x onerror=f()>\ud800"


def packed(page: str) -> str:
    """What the charts of a page are drawn from."""
    (found,) = re.findall(r'<script type="[^"]*" id="data">([^<]*)</script>', page)
    return gzip.decompress(base64.b64decode(found)).decode()


def chart_of(page: str, title: str) -> dict:
    """A chart's data by its title."""
    (chart,) = (c for c in json.loads(packed(page))["charts"] if c["title"] == title)
    return chart


def test_the_charts_hold_the_numbers_of_metrics(tmp_path):
    lines = [line_of(step) for step in range(1, 51)]
    lines.append({"step": 50, "validation_loss": 2.25})
    out = write_report([write_run(tmp_path / "run", lines)])
    assert out == tmp_path / "run" / "report.html"
    text = out.read_text()
    each, _, validation = chart_of(text, "Loss")["lines"]
    assert each["step"] == list(range(1, 51)) and each["tokens"] == [512 * s for s in each["step"]]
    assert each["y"] == pytest.approx([line["loss"] for line in lines[:50]], rel=1e-7)
    assert (validation["step"], validation["tokens"], validation["y"]) == ([50], [25600], [2.25])
    kinds = {
        line["name"]: line for line in chart_of(text, "Gradient norm by kind of block")["lines"]
    }
    assert kinds["mamba"]["step"] == [1, 10, 20, 30, 40, 50]
    there = [line["gradient_norm/mamba"] for line in lines if "gradient_norm/mamba" in line]
    assert kinds["mamba"]["y"] == pytest.approx(there, rel=1e-7)
    memory = chart_of(text, "Memory, the most so far")["lines"][0]["y"]
    assert memory[-1] == pytest.approx((3 * 2**30 + 50) / 2**30, rel=1e-7)


def test_the_heat_maps_hold_entropy_and_loads_by_layer(tmp_path):
    lines = [line_of(step) for step in range(1, 31)]
    text = write_report([write_run(tmp_path / "run", lines)]).read_text()
    (entropy,) = chart_of(text, "Entropy of the load")["frames"]
    assert (entropy["rows"], entropy["step"]) == (["1", "3", "10"], [1, 10, 20, 30])
    told = [line["experts/entropy/10"] for line in lines if "experts/entropy/10" in line]
    assert entropy["z"][2] == pytest.approx(told, rel=1e-3)
    first, _, last = chart_of(text, "Load of each expert, by layer")["frames"]
    assert (first["name"], last["name"], len(last["rows"])) == ("layer 1", "layer 10", 8)
    loads = [line["experts/load"]["10"][5] / 100 for line in lines if "experts/load" in line]
    assert last["z"][5] == pytest.approx(loads, rel=1e-3)


def test_stretches_of_a_long_heat_map_keep_their_worst_value(tmp_path):
    lines = [{"step": s, "experts/entropy/4": 0.1 if s == 777 else 0.9} for s in range(1, 2001)]
    text = write_report([write_run(tmp_path / "run", lines)]).read_text()
    (frame,) = chart_of(text, "Entropy of the load")["frames"]
    assert len(frame["step"]) == 400 and frame["step"][-1] == 2000
    cells = dict(zip(frame["step"], frame["z"][0], strict=True))
    assert cells.pop(780) == 0.1 and set(cells.values()) == {0.9}


def test_text_of_files_is_text(tmp_path):
    lines = [line_of(1), line_of(10, **{f"gradient_norm/{HOSTILE}": 1.0})]
    lines.append({HOSTILE: {HOSTILE: 1.5}, "other": HOSTILE})
    folder = write_run(tmp_path / "a<b>&c", lines, outcome=HOSTILE, command=[HOSTILE])
    sample = {"step": 1, "prompt": HOSTILE, "text": HOSTILE}
    (folder / "samples.jsonl").write_text(json.dumps(sample))
    with (folder / "train.toml").open("a") as file:
        file.write("# </script><script>fetch('http://evil.example/')</script>")
    text = write_report([folder]).read_text()
    # Three scripts of our own, none of a file; no image, and nothing with a handler.
    assert len(re.findall("<script", text)) == 3 and "<img" not in text
    assert "a&lt;b&gt;&amp;c</h1>" in text
    assert text.count("&lt;/script&gt;&lt;script&gt;fetch(") > 6
    assert HOSTILE[:40] in packed(text)  # packed, where no parser of HTML looks


def test_only_its_own_scripts_may_run_and_nothing_may_be_fetched(tmp_path):
    text = write_report([write_run(tmp_path / "run", [line_of(1)])]).read_text()
    (policy,) = re.findall(r'http-equiv="Content-Security-Policy" content="([^"]*)"', text)
    assert policy.startswith("default-src 'none'") and policy.count("sha256-") == 2
    assert "unsafe-inline" not in policy.split("script-src")[1] and "http" not in policy
    assert re.findall(r'(?:src|href)="(?!data:,)[^"]*"', text) == []


def test_a_value_that_is_not_finite_is_a_gap(tmp_path):
    lines = [line_of(1), line_of(2, loss=float("nan")), line_of(3)]
    text = write_report([write_run(tmp_path / "run", lines)]).read_text()
    assert chart_of(text, "Loss")["lines"][0]["y"][1] is None
    assert "NaN" not in packed(text) and "loss is NaN or infinite at step 2." in text


def test_several_runs_are_compared_by_line_and_by_option(tmp_path):
    folders = [
        write_run(tmp_path / name, [line_of(step, loss=loss) for step in range(1, 9)], steps)
        for name, loss, steps in (("a", 2.0, 10), ("b", 3.0, 20))
    ]
    out = write_report(folders, tmp_path / "both.html")
    text = out.read_text()
    lines = chart_of(text, "Training loss, smoothed")["lines"]
    assert [(line["name"], line["y"][-1]) for line in lines] == [("a", 2), ("b", 3)]
    assert "<td>schedule.steps</td><td>10</td><td>20</td>" in text
    assert "data.rows" not in text


def test_runs_of_one_name_are_told_apart_by_their_folders(tmp_path):
    folders = [write_run(tmp_path / name / "run", [line_of(1)]) for name in "ab"]
    text = write_report(folders, tmp_path / "both.html").read_text()
    names = [line["name"] for line in chart_of(text, "Training loss, smoothed")["lines"]]
    assert names == list(map(str, folders))


def test_a_file_that_is_no_page_is_not_written_over(tmp_path):
    folder = write_run(tmp_path / "run", [line_of(1)])
    other = tmp_path / "mine.html"
    other.write_text("<html>my own</html>")
    with pytest.raises(ValueError, match=r"mine.html is no page that this command wrote"):
        write_report([folder], other)
    assert other.read_text() == "<html>my own</html>"
    write_report([folder])
    before = (folder / "report.html").read_bytes()
    write_report([folder])
    assert len((folder / "report.html").read_bytes()) == len(before)


def test_what_is_no_run_is_refused(tmp_path):
    with pytest.raises(ValueError, match="nothing to report"):
        write_report([])
    with pytest.raises(ValueError, match="nowhere: no folder of a run"):
        write_report([tmp_path / "nowhere"])


def test_the_facts_are_the_figures_of_the_run(tmp_path):
    lines = [line_of(step) for step in range(1, 21)]
    lines += [{"step": 10, "validation_loss": 2.5}, {"step": 20, "validation_loss": 2.75}]
    page = run_page(read_run(write_run(tmp_path / "run", lines, outcome="finished")))
    assert page.facts["steps"] == "20 of 100" and page.facts["tokens"] == "10,240"
    assert page.facts["best validation loss"] == "2.5000 (step 10)"
    assert page.facts["time of steps"] == "10 s"
    assert (page.word, page.refreshed) == ("finished", None)
