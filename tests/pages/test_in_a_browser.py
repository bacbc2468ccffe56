"""A run's page in Chromium: what it shows is what was measured, at the width of a desk and of a
phone, and nothing is asked of anybody."""

import json
import math
import time
from pathlib import Path
from typing import Any

import pytest
from PIL import Image

from nemotron_v3.data.options import Source
from nemotron_v3.evaluation.page import write_report as write_evaluation
from nemotron_v3.pages import write_report
from nemotron_v3.train.options import LogOptions, ScheduleOptions, ValidationOptions
from nemotron_v3.train.run import train
from tests.browser import CHROMIUM, Browser, chromium, need
from tests.evaluation.test_page import checkpoint, text_of
from tests.evaluation.test_page import write as write_json
from tests.pages.runs import line_of, write_run
from tests.train.conftest import base, options  # noqa: F401
from tests.train.fakes import MadeUp

pytestmark = pytest.mark.integration
WIDTHS = (1280, 400)
ALL_TABS = ("Curves", "Routers", "Results", "Configuration", "Versions")
# What the scripts below say in short: a figure by its title, its plot, a middle to click on.
HELPERS = """
window.all = (selector) => [...document.querySelectorAll(selector)];
window.figure = (title) => all('figure').find((f) => f.querySelector('h3').textContent === title);
window.plot = (title) => figure(title).querySelector('.plot');
window.line = (title, name) => plot(title).data.find((trace) => trace.name === name);
window.box = (element) => {
  element.scrollIntoView({ block: 'center' });
  const { x, y, width, height } = element.getBoundingClientRect();
  return [x, y, width, height];
};
window.choose = (select, value) => {
  select.value = value;
  select.dispatchEvent(new Event('change'));
};
true
"""


@pytest.fixture(scope="module")
def browser(tmp_path_factory):
    need(CHROMIUM, "chromium")
    with chromium(tmp_path_factory.mktemp("profile")) as started:
        yield started


class NoTokenizer:
    """Of data that are made up."""

    chat_template = None


@pytest.fixture
def trained(options) -> Path:  # noqa: F811
    """The folder of a run of a few steps."""
    asked = options(
        schedule=ScheduleOptions(steps=12),
        log=LogOptions(details=2, peak_tflops=1.0),
        validation=ValidationOptions(sources=(Source("made up"),), every=4, rows=4),
    )
    train(asked, tokenizer=NoTokenizer(), make_data=MadeUp)
    return asked.out


def show(browser: Browser, page: Path, width: int, **more: Any) -> float:
    """Open a page and wait until it has drawn; gives the seconds that took."""
    start = time.perf_counter()
    browser.open(page.resolve().as_uri(), width, **more)
    browser.until("document.documentElement.dataset.ready === 'true'")
    seconds = time.perf_counter() - start
    assert browser.run(HELPERS)
    return seconds


def press(browser: Browser, element: str) -> None:
    """Click in the middle of an element."""
    x, y, width, height = browser.run(f"box({element})")
    browser.press(x + width / 2, y + height / 2)


def tab(browser: Browser, name: str) -> None:
    """Click a tab, and look whether its part alone is there and fits."""
    press(browser, f"all('[role=tab]').find((t) => t.textContent === '{name}')")
    browser.until(f"all('[aria-selected=true]')[0].textContent === '{name}'")
    assert browser.run("all('main > section').filter((s) => s.offsetHeight > 0).length") == 1
    assert browser.run("document.documentElement.scrollWidth - innerWidth") <= 0


def nothing_asked(browser: Browser, page: Path) -> None:
    """Nothing but the page itself, and pictures that it holds, was wanted; no script failed."""
    outside = [a for a in browser.asked if not a.startswith(("data:", "blob:"))]
    assert outside == [page.resolve().as_uri()]
    assert browser.errors == []


@pytest.mark.parametrize("width", WIDTHS)
def test_the_page_of_a_run_shows_what_was_measured(trained, browser, width):
    page = trained / "report.html"
    lines = [json.loads(line) for line in (trained / "metrics.jsonl").read_text().splitlines()]
    show(browser, page, width)
    assert browser.run("innerWidth") == width
    told = browser.run("all('.state')[0].textContent")
    assert "finished" in told and "step 12 of 12" in told
    steps = [line for line in lines if "loss" in line]
    for title, name, scale in (
        ("Loss", "loss", 1),
        ("Learning rate", "learning_rate", 1),
        ("Gradient norm, before clipping", "gradient_norm", 1),
        ("Speed", "tokens_per_second", 1),
        ("Model FLOPs utilisation", "mfu", 100),
    ):
        x, y = browser.run(f"(({{ x, y }}) => [x, y])(plot('{title}').data[0])")
        assert x == [line["step"] for line in steps]
        assert y == pytest.approx([scale * line[name] for line in steps], rel=1e-6)
    there = [line["validation_loss"] for line in lines if "validation_loss" in line]
    assert browser.run("line('Loss', 'validation').y") == pytest.approx(there, rel=1e-6)
    assert len(there) == 3
    measured = [line for line in lines if "gradient_norm/mamba" in line]
    kinds = browser.run("plot('Gradient norm by kind of block').data.map((t) => [t.name, t.y])")
    assert {"mamba", "attention", "experts", "router"} <= {kind for kind, _ in kinds}
    for kind, y in kinds:
        assert y == pytest.approx([line[f"gradient_norm/{kind}"] for line in measured], rel=1e-6)
    # The figures that are text say the same.
    labels, values = (
        browser.run(f"all('.facts {d}').map((d) => d.textContent)") for d in ["dt", "dd"]
    )
    assert dict(zip(labels, values, strict=True))["last loss"] == f"{steps[-1]['loss']:.4f}"
    tab(browser, "Routers")
    z = browser.run("plot('Entropy of the load').data[0].z")
    assert z[0] == pytest.approx([line["experts/entropy/1"] for line in measured], rel=1e-3)
    by_expert = browser.run("plot('Load of each expert, by layer').data[0].z")
    for place, line in enumerate(measured):
        loads = [load / 100 for load in line["experts/load"]["1"]]
        assert [of_expert[place] for of_expert in by_expert] == pytest.approx(loads, rel=1e-3)
    nothing_asked(browser, page)


@pytest.fixture(scope="module")
def long_run(tmp_path_factory) -> Path:
    """The page of 20 000 steps, one of them a spike."""
    lines = [line_of(step) for step in range(1, 20_001)]
    lines[7654]["loss"] = 100.0
    folder = tmp_path_factory.mktemp("long") / "run"
    return write_report([write_run(folder, lines, 20_000, outcome="finished")])


@pytest.mark.parametrize("width", WIDTHS)
def test_a_drag_looks_closer_in_all_curves_and_finds_what_was_left_out(browser, long_run, width):
    show(browser, long_run, width)
    # The spike is seen among 20 000 steps, most of which are not.
    assert browser.run("Math.max(...plot('Loss').data[0].y)") == 100.0
    assert browser.run("plot('Loss').data[0].x.length") < 2 * width + 10
    whole = browser.run("plot('Loss')._fullLayout.xaxis.range")
    x, y, wide, high = browser.run("box(plot('Loss').querySelector('.nsewdrag'))")
    middle = y + high / 2
    browser.drag((x + 0.37 * wide, middle), (x + 0.40 * wide + 10, middle))
    browser.until("!document.getElementById('all').hidden")
    low, high = browser.run("plot('Loss')._fullLayout.xaxis.range")
    assert whole[0] < low < 7655 < high < whole[1] and high - low < 2500
    seen = f"plot('Loss').data[0].x.filter((x) => x >= {low} && x <= {high}).length"
    assert browser.run(seen) > 0.35 * (high - low)
    ranges = browser.run("all('.shown .plot').map((p) => p._fullLayout.xaxis.range)")
    assert ranges == [[low, high]] * 7
    press(browser, "document.getElementById('all')")
    browser.until(f"plot('Loss')._fullLayout.xaxis.range[1] > {whole[1] - 1000}")
    nothing_asked(browser, long_run)


@pytest.mark.parametrize("width", WIDTHS)
def test_legends_tabs_and_choices_do_what_they_say(browser, long_run, width):
    show(browser, long_run, width)
    for visible in ("'legendonly'", "true"):
        press(browser, "plot('Loss').querySelector('.legendtoggle')")
        browser.until(f"plot('Loss').data[0].visible === {visible}")
    browser.run("choose(document.getElementById('axis'), 'tokens')")
    browser.until(f"plot('Loss').data[0].x.at(-1) === {512 * 20_000}")
    press(browser, "figure('Loss').querySelector('.choices button')")
    browser.until("plot('Loss')._fullLayout.yaxis.type === 'log'")
    for name in reversed(ALL_TABS):
        tab(browser, name)
    tab(browser, "Routers")
    loads = "plot('Load of each expert, by layer').data[0].z[0]"
    first = browser.run(loads)
    browser.run("choose(figure('Load of each expert, by layer').querySelector('select'), '2')")
    browser.until(f"JSON.stringify({loads}) !== JSON.stringify({json.dumps(first)})")
    paper = "getComputedStyle(document.documentElement).backgroundColor"
    light = browser.run(paper)
    press(browser, "document.getElementById('theme')")
    browser.until(f"{paper} !== {json.dumps(light)}")
    nothing_asked(browser, long_run)


def test_a_page_of_100_000_steps_is_small_and_opens_soon(browser, tmp_path):
    lines = [line_of(step) for step in range(1, 100_001)]
    page = write_report([write_run(tmp_path / "run", lines, 100_000, outcome="finished")])
    assert page.stat().st_size < 5e6
    # The page's own thread, by processor time: a machine that does other things has it wait.
    browser.call("Performance.enable", timeDomain="threadTicks")
    show(browser, page, 1280)
    metrics = browser.call("Performance.getMetrics")["metrics"]
    assert 0.1 < next(m["value"] for m in metrics if m["name"] == "TaskDuration") < 3
    nothing_asked(browser, page)


@pytest.mark.parametrize("width", WIDTHS)
def test_text_of_files_stays_text(browser, tmp_path, width):
    evil = '</script><img src=http://127.0.0.1:9/x onerror="window.hit=1"><b>bold</b>'
    lines = [line_of(1), line_of(10, **{f"gradient_norm/{evil}": 1.0})]
    lines.append({evil: {evil: 1.0, "b": 2.0}})
    folder = write_run(tmp_path / "<b>run", lines, outcome=evil, command=[evil])
    (folder / "samples.jsonl").write_text(json.dumps({"text": evil, "prompt": evil}))
    page = write_report([folder])
    show(browser, page, width)
    for name in (*ALL_TABS, "Curves"):
        tab(browser, name)
    assert browser.run("window.hit === undefined && all('img, pre b, h1 b, svg a').length === 0")
    assert browser.run("all('h1')[0].textContent") == "<b>run"
    legend = "plot('Gradient norm by kind of block').querySelector('.legend').textContent"
    assert "<b>bold</b>" in browser.run(legend)
    nothing_asked(browser, page)


def test_paper_shows_all_parts_in_light_colours(browser, long_run):
    show(browser, long_run, 1280, dark=True)
    printed = browser.printed()
    assert printed.startswith(b"%PDF") and len(printed) > 50_000
    # All charts were drawn for it, and the screen is as it was.
    assert browser.run("all('.plot').every((p) => p.data)")
    assert browser.run("document.documentElement.dataset.theme") == "dark"
    assert browser.run("all('main > section').filter((s) => s.offsetHeight > 0).length") == 1
    nothing_asked(browser, long_run)


@pytest.mark.parametrize("width", WIDTHS)
def test_an_evaluation_shows_a_bar_for_each_figure(browser, tmp_path, width):
    names = ("a", "b", "c")
    scored = [checkpoint(n, [text_of([60.0 + i, 80.0])]) for i, n in enumerate(names)]
    page = write_evaluation([write_json(tmp_path / "eval.json", *scored)])
    show(browser, page, width)
    bars = browser.run("plot('Bits a byte').data.map((bar) => [bar.name, bar.y[0]])")
    assert bars == [
        [name, pytest.approx((140 + i) / math.log(2) / 800, rel=1e-6)]
        for i, name in enumerate(names)
    ]
    # Each is seen: most of its middle has not the colour of the page.
    for number in range(3):
        bar = f"plot('Bits a byte').querySelectorAll('.bars path')[{number}]"
        x, y, wide, high = map(round, browser.run(f"box({bar})"))
        browser.picture(tmp_path / "seen.png")
        middle = (x + 2, y + 2, x + wide - 2, y + high - 2)
        seen = Image.open(tmp_path / "seen.png").convert("RGB").crop(middle)
        size = seen.width * seen.height
        paper = sum(n for n, colour in seen.getcolors(size) if colour == (255, 255, 255))
        assert paper < 0.5 * size and size > 1000
    tab(browser, "Documents")
    assert browser.run("plot('Bits a byte by document: held out.txt').data.length") == 3
    cells = browser.run("all('.shown .blocks > div td').map((cell) => cell.textContent)")
    assert cells[:4] == ["a.txt #1", "400", "100", f"{60 / math.log(2) / 400:.4f}"]
    nothing_asked(browser, page)
