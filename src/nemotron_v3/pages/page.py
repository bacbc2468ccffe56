"""One file of HTML that holds all it needs: text, numbers, styles, and the library that draws.

Text from files is escaped where it stands in HTML; what the charts show is compressed JSON, which
page.js writes as text alone. A policy in the page's head lets nothing be fetched and no script run
but the two that the page was written with.
"""

import base64
import gzip
import hashlib
import html
import json
import time
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from functools import cache
from math import isfinite
from pathlib import Path

from nemotron_v3.config.atomic import atomic_file
from nemotron_v3.pages import chart as charts

# By it a page is known that may be written anew.
GENERATOR = "nemotron-v3 report"
_HERE = Path(__file__).parent
_POLICY = (
    "default-src 'none'; style-src 'unsafe-inline'; img-src data: blob:; "
    "script-src {scripts}; base-uri 'none'; form-action 'none'"
)


@dataclass(frozen=True)
class Table:
    """Rows of cells under a head. `numeric` columns are set to the right."""

    head: Sequence[str]
    rows: Sequence[Sequence[str]]
    title: str = ""
    numeric: frozenset[int] = frozenset()
    note: str = ""


@dataclass(frozen=True)
class Passage:
    """Text as it is, line breaks included, under a title; `prompt` stands before it, set apart."""

    title: str
    text: str
    prompt: str = ""


Block = charts.Lines | charts.Heat | charts.Bars | Table | Passage


@dataclass(frozen=True)
class Tab:
    """A part of a page. `empty` says why there is nothing where it has no blocks."""

    name: str
    blocks: Sequence[Block]
    empty: str = ""


@dataclass(frozen=True)
class Page:
    """All that a page says.

    Attributes:
        title: its name.
        kind: of page, above the title.
        word: of the state, for its colour, and `told`, the sentence; "" for none.
        facts: figures at the top, by label.
        notices: what the reader has to know of broken parts.
        missing: what a reader may look for and is not there, with the reason.
        tabs: at least one.
        refreshed: seconds after which a running run writes it anew; None where nothing will.
    """

    title: str
    kind: str
    tabs: Sequence[Tab]
    word: str = ""
    told: str = ""
    facts: dict[str, str] = field(default_factory=dict)
    notices: Sequence[str] = ()
    missing: Sequence[str] = ()
    refreshed: float | None = None


def write_page(page: Page, path: Path) -> None:
    """Write it whole or not at all.

    Raises:
        ValueError: something else than such a page stands at `path`.
        OSError: the disk refuses.
    """
    check_replaceable(path)
    text = page_text(page)
    path.parent.mkdir(parents=True, exist_ok=True)
    with atomic_file(path) as temporary:
        temporary.write_bytes(text.encode("utf-8", "replace"))


def check_replaceable(path: Path) -> None:
    """Raise ValueError where a file would be lost."""
    if not path.exists():
        return
    if path.is_file():
        with path.open("rb") as file:
            if GENERATOR.encode() in file.read(2000):
                return
    raise ValueError(f"{path} is no page that this command wrote: give another --out")


def page_text(page: Page) -> str:
    """The page as HTML."""
    drawn = [b for tab in page.tabs for b in tab.blocks if isinstance(b, charts.Chart)]
    numbers = {id(chart): number for number, chart in enumerate(drawn)}
    panels = "".join(_panel(n, tab, numbers) for n, tab in enumerate(page.tabs))
    data = json.dumps({"charts": [chart.data() for chart in drawn]}, separators=(",", ":"))
    script, style = ((_HERE / name).read_text("utf-8") for name in ("page.js", "page.css"))
    library, library_hash, version = _library()
    hashes = f"'{_hash(script)}' '{library_hash}'"
    now = time.time()
    written = time.strftime("%Y-%m-%d %H:%M UTC", time.gmtime(now))
    return f"""<!doctype html>
<html lang="en">
<head>
<meta charset="utf-8">
<meta http-equiv="Content-Security-Policy" content="{_POLICY.format(scripts=hashes)}">
<meta name="generator" content="{GENERATOR}">
<meta name="viewport" content="width=device-width, initial-scale=1">
<meta name="color-scheme" content="light dark">
<title>{_text(page.title)} - {_text(page.kind)}</title>
<link rel="icon" href="data:,">
<style>{style}</style>
</head>
<body data-written="{now:.0f}" data-refreshed="{page.refreshed or ""}">
<header>
<p class="kind">{_text(page.kind)}</p>
<h1>{_text(page.title)}</h1>
{_state(page)}
{_facts(page.facts)}
{_notices(page.notices)}
{_missing(page.missing)}
<noscript><p class="notice">The curves are drawn by a script, which is off in this browser. The
tables below hold their figures.</p></noscript>
</header>
<div class="bar">
<div role="tablist" aria-label="Parts of the page">{_tab_buttons(page.tabs)}</div>
<div class="controls" hidden>
<label>over <select id="axis"><option value="step">steps</option><option value="tokens">tokens
</option></select></label>
<button id="all" type="button" hidden>show all</button>
<button id="theme" type="button">light / dark</button>
</div>
</div>
<main>
{panels}
</main>
<footer>
<p>Written {written} by nemotron-v3. Curves: plotly.js {version} (MIT). The page is one file and
fetches nothing.</p>
<p>Drag in a curve to look closer, double-click to see all of it; click a name in a legend to hide
its line. A curve of many steps keeps the least and the greatest value of every stretch.</p>
</footer>
<script type="application/gzip;base64" id="data">{_packed(data)}</script>
<script type="application/gzip;base64" id="library">{library}</script>
<script>{script}</script>
</body>
</html>
"""


def _text(text: object) -> str:
    return html.escape(str(text))


def _state(page: Page) -> str:
    if not page.told:
        return ""
    return (
        f'<p class="state {_text(page.word)}"><b>{_text(page.word)}</b> '
        f'<span id="told">{_text(page.told)}</span></p>'
    )


def _facts(facts: dict[str, str]) -> str:
    if not facts:
        return ""
    items = "".join(
        f"<div><dt>{_text(label)}</dt><dd>{_text(value)}</dd></div>"
        for label, value in facts.items()
    )
    return f'<dl class="facts">{items}</dl>'


def _notices(notices: Iterable[str]) -> str:
    items = "".join(f"<li>{_text(notice)}</li>" for notice in notices)
    return f'<ul class="notice" aria-label="What to know">{items}</ul>' if items else ""


def _missing(missing: Sequence[str]) -> str:
    return f'<p class="note missing">{_text(" ".join(missing))}</p>' if missing else ""


def _tab_buttons(tabs: Sequence[Tab]) -> str:
    return "".join(
        f'<button type="button" role="tab" id="tab-{n}" aria-controls="panel-{n}" '
        f'aria-selected="{"true" if n == 0 else "false"}">{_text(tab.name)}</button>'
        for n, tab in enumerate(tabs)
    )


def _panel(number: int, tab: Tab, charts_by_id: dict[int, int]) -> str:
    inside = "".join(_block(block, charts_by_id) for block in tab.blocks)
    if not tab.blocks:
        inside = f'<p class="empty">{_text(tab.empty)}</p>'
    return (
        f'<section role="tabpanel" id="panel-{number}" aria-labelledby="tab-{number}">'
        f"<h2>{_text(tab.name)}</h2><div class=blocks>{inside}</div></section>\n"
    )


def _block(block: Block, charts_by_id: dict[int, int]) -> str:
    match block:
        case Table():
            return _table(block)
        case Passage():
            prompt = f"<span class=prompt>{_text(block.prompt)}</span>" if block.prompt else ""
            return (
                f'<article class="wide"><h3>{_text(block.title)}</h3>'
                f"<pre>{prompt}{_text(block.text)}</pre></article>"
            )
        case _:
            return _figure(block, charts_by_id[id(block)])


def _figure(chart: charts.Chart, number: int) -> str:
    wide = ' class="wide"' if chart.wide else ""
    note = f'<p class="note">{_text(chart.note)}</p>' if chart.note else ""
    return (
        f'<figure{wide} data-chart="{number}"><figcaption><h3>{_text(chart.title)}</h3>{note}'
        f'<span class="choices"></span></figcaption>'
        f'<div class="plot" role="img" aria-label="{_text(chart.title)}"></div>'
        f"{_figures_of(chart)}</figure>"
    )


def _figures_of(chart: charts.Chart) -> str:
    """The figures of a chart as a table, for those who do not see it, and for paper."""
    if not isinstance(chart, charts.Lines):
        return ""
    rows = []
    for line in chart.lines:
        finite = [
            (value, step)
            for value, step in zip(line.values, line.steps, strict=True)
            if isfinite(value)
        ]
        if finite:
            told = (finite[-1], min(finite), max(finite))
            rows.append(
                (line.name, *(f"{short(value)} ({chart.x} {step:,.0f})" for value, step in told))
            )
    if not rows:
        return ""
    table = Table(("", "last", "least", "greatest"), rows, numeric=frozenset({1, 2, 3}))
    return f"<details><summary>figures</summary>{_table(table)}</details>"


def _table(table: Table) -> str:
    def row(cells: Sequence[str], tag: str) -> str:
        marks = (' class="number"' if i in table.numeric else "" for i in range(len(cells)))
        inside = (f"<{tag}{m}>{_text(c)}</{tag}>" for m, c in zip(marks, cells, strict=True))
        return f"<tr>{''.join(inside)}</tr>"

    title = f"<h3>{_text(table.title)}</h3>" if table.title else ""
    note = f'<p class="note">{_text(table.note)}</p>' if table.note else ""
    head = f"<thead>{row(table.head, 'th')}</thead>" if any(table.head) else ""
    body = "".join(row(cells, "td") for cells in table.rows)
    return (
        f'<div class="wide">{title}{note}<div class="scroll"><table>{head}<tbody>{body}</tbody>'
        "</table></div></div>"
    )


def short(value: float) -> str:
    """A figure for reading: five digits, and thousands apart."""
    if value == 0 or 1e-3 <= abs(value) < 1e5:
        return f"{value:.5g}"
    return f"{value:,.0f}" if 1e5 <= abs(value) < 1e15 else f"{value:.4g}"


def _packed(text: str) -> str:
    # The time in gzip's header is left out, so that the same numbers give the same bytes.
    return base64.b64encode(gzip.compress(text.encode("utf-8"), 6, mtime=0)).decode("ascii")


def _hash(script: str) -> str:
    digest = hashlib.sha256(script.encode("utf-8")).digest()
    return f"sha256-{base64.b64encode(digest).decode('ascii')}"


@cache
def _library() -> tuple[str, str, str]:
    """plotly.js packed, the hash that lets it run, and its version.

    The package `plotly` ships it whole, 4.8 MB, of which 2.0 are left when it is packed.
    """
    try:
        from plotly.offline import get_plotlyjs, get_plotlyjs_version
    except ImportError:
        raise ValueError("a page needs plotly: pip install plotly") from None
    text = get_plotlyjs()
    return _packed(text), _hash(text), get_plotlyjs_version()
