"""The documentation site: it builds strictly, no link is broken, nothing is loaded from elsewhere,
pages fit a phone, and the search finds a class."""

import functools
import http.server
import importlib.util
import json
import os
import subprocess
import sys
import threading
from html.parser import HTMLParser
from pathlib import Path
from urllib.parse import unquote, urldefrag, urlsplit

import pytest

import nemotron_v3
from nemotron_v3 import (
    adapters,
    checkpoint,
    data,
    evaluation,
    generation,
    hf,
    layers,
    nemo,
    parallel,
)
from tests.browser import CHROMIUM, need

ROOT = Path(__file__).parents[2]
pytestmark = pytest.mark.integration


@pytest.fixture(scope="module")
def site(tmp_path_factory):
    need(importlib.util.find_spec("mkdocs"), "mkdocs")
    folder = tmp_path_factory.mktemp("site")
    done = subprocess.run(
        [sys.executable, "-m", "mkdocs", "build", "--strict", "--site-dir", str(folder)],
        cwd=ROOT, capture_output=True, text=True,
        env=os.environ | {"NO_MKDOCS_2_WARNING": "1"},
    )  # fmt: skip
    assert done.returncode == 0, done.stderr[-3000:]
    assert "WARNING" not in done.stderr, done.stderr
    return folder


class Page(HTMLParser):
    """What a page links to, what it loads, and its anchors."""

    def __init__(self, path: Path):
        super().__init__()
        self.links: list[str] = []
        self.loaded: list[str] = []
        self.anchors: set[str] = set()
        self.feed(path.read_text("utf-8"))

    def handle_starttag(self, tag, attributes):
        found = dict(attributes)
        self.anchors |= {found[name] for name in ("id", "name") if found.get(name)}
        if tag == "a" and found.get("href"):
            self.links.append(found["href"])
        if tag == "link" and found.get("rel") not in ("canonical", "next", "prev"):
            self.loaded.append(found["href"])
        if tag in ("script", "img", "iframe", "source") and found.get("src"):
            self.loaded.append(found["src"])


@pytest.fixture(scope="module")
def pages(site):
    return {path: Page(path) for path in site.rglob("*.html") if path.name != "404.html"}


def test_every_link_leads_to_a_page_and_its_place(site, pages):
    assert len(pages) > 30
    broken, checked = [], 0
    for path, page in pages.items():
        for link in page.links + page.loaded:
            if urlsplit(link).scheme in ("http", "https", "mailto", "data"):
                continue
            target, anchor = urldefrag(link)
            place = (path.parent / unquote(target)).resolve() if target else path.resolve()
            checked += 1
            if not place.is_file():
                broken.append((path.name, link))
            elif anchor and place.suffix == ".html" and anchor not in ("", "__skip"):
                known = pages.get(place) or Page(place)
                if unquote(anchor) not in known.anchors:
                    broken.append((path.name, link))
    assert broken == [] and checked > 1000


def test_nothing_is_loaded_from_another_host(site, pages):
    outside = [
        (path.name, loaded)
        for path, page in pages.items()
        for loaded in page.loaded
        if urlsplit(loaded).netloc
    ]
    assert outside == []
    for style in site.rglob("*.css"):
        assert "url(http" not in style.read_text("utf-8").replace('"', "").replace("'", "")
    assert not list(site.rglob("*.woff*"))
    assert not list(site.rglob("*.py"))


def test_the_reference_has_every_public_name(site):
    text = "".join(p.read_text("utf-8") for p in (site / "reference").glob("*.html"))
    # What a caller meets only in the hands of the others.
    left_out = {
        "CheckpointError",
        "CheckpointOrigin",
        "LoadReport",
        "Checkpoint",
        "open_checkpoint",
    }
    left_out |= {"NEWEST", "OLDEST", "check_version"}
    rooms = (
        nemotron_v3,
        adapters,
        checkpoint,
        data,
        evaluation,
        generation,
        hf,
        layers,
        nemo,
        parallel,
    )
    for room in rooms:
        names = {name for name in room.__all__ if f"{name}</" in text or f".{name}" in text}
        assert set(room.__all__) - names <= left_out, room.__name__


PROBE = """<!doctype html><title>probe</title><script>
const wait = ms => new Promise(done => setTimeout(done, ms));
async function open(path, width) {
  const frame = document.createElement("iframe");
  frame.width = width; frame.height = 900; frame.src = path;
  document.body.append(frame);
  await new Promise(done => frame.onload = done);
  await wait(500);
  return frame.contentDocument;
}
async function probe() {
  const told = {widths: {}, found: []};
  for (const path of PAGES) for (const width of [1280, 400])
    told.widths[path + " " + width] = (await open(path, width)).documentElement.scrollWidth - width;
  const page = await open("index.html?q=SequenceLayout", 1280);
  for (let i = 0; i < 100 && !told.found.length; i++) {
    await wait(200);
    told.found = [...page.querySelectorAll(".md-search-result__link")].map(a => a.getAttribute("href"));
  }
  await fetch("told", {method: "POST", body: JSON.stringify(told)});
}
window.onload = () => probe().catch(e => fetch("told", {method: "POST", body: JSON.stringify(String(e))}));
</script><body></body>"""  # noqa: E501
LOOKED_AT = ["index.html", "reference/layout.html", "which-machine.html", "cli.html"]


class Handler(http.server.SimpleHTTPRequestHandler):
    """The site, a page that looks at it from inside the browser, and a place to tell."""

    def do_GET(self):
        if self.path != "/probe.html":
            return super().do_GET()
        body = PROBE.replace("PAGES", json.dumps(LOOKED_AT)).encode()
        self.send_response(200)
        self.send_header("Content-Type", "text/html")
        self.end_headers()
        self.wfile.write(body)

    def do_POST(self):
        raw = self.rfile.read(int(self.headers["Content-Length"]))
        self.server.told = json.loads(raw)
        self.send_response(204)
        self.end_headers()
        self.server.done.set()

    def log_message(self, *_):
        pass


def test_in_a_browser_pages_fit_and_the_search_finds_a_class(site, tmp_path):
    need(CHROMIUM, "chromium")
    handler = functools.partial(Handler, directory=str(site))
    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), handler) as server:
        server.done, server.told = threading.Event(), None
        threading.Thread(target=server.serve_forever, daemon=True).start()
        browser = subprocess.Popen(
            [
                CHROMIUM, "--headless", "--no-sandbox", "--disable-gpu", "--disable-dev-shm-usage",
                f"--user-data-dir={tmp_path}", "--remote-debugging-port=0",
                f"http://127.0.0.1:{server.server_port}/probe.html",
            ],
            stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL,
        )  # fmt: skip
        try:
            assert server.done.wait(120), "the browser told nothing in two minutes"
        finally:
            browser.terminate()
            browser.wait(30)
            server.shutdown()
    assert isinstance(server.told, dict), server.told
    # No page is wider than its window: tables and code scroll by themselves.
    assert {name: over for name, over in server.told["widths"].items() if over > 0} == {}
    assert any("reference/layout.html" in link for link in server.told["found"]), server.told
