"""The README and the pages of docs/: their Python blocks work, and what they name is there."""

import re
from pathlib import Path
from typing import Any

import pytest

ROOT = Path(__file__).parents[1]
README = ROOT / "README.md"
LONGEST = 150
BLOCK = re.compile(r"^```(\w*)\n(.*?)^```", re.MULTILINE | re.DOTALL)


def blocks(language: str, page: Path = README) -> list[str]:
    return [body for name, body in BLOCK.findall(page.read_text("utf-8")) if name == language]


DOCS = sorted((ROOT / "docs").rglob("*.md"))
PAGES = [README, *(page for page in DOCS if blocks("python", page))]
LINK = re.compile(r"\]\((?!https?:)([^)#\s]*)(?:#[^)\s]*)?\)")


def tree_paths(tree: str) -> list[str]:
    """The paths of a file tree: one a line, before its description, a folder ending in `/` and
    what is in it indented below (drawn with lines or not)."""
    folders: list[tuple[int, str]] = []
    paths = []
    for line in tree.splitlines():
        match = re.match(r"([\s│├└─|`+-]*)([\w.*/-]+)", line)
        if match is None:
            continue
        indent, name = len(match[1]), match[2]
        while folders and folders[-1][0] >= indent:
            folders.pop()
        path = (folders[-1][1] if folders else "") + name
        paths.append(path)
        if name.endswith("/"):
            folders.append((indent, path))
    return paths


def with_its_mark(page: Path) -> Any:
    """How-to pages run trainers of other projects, which takes long."""
    slow = [pytest.mark.integration] if page.parent.name == "howto" else []
    return pytest.param(page, id=page.relative_to(ROOT).as_posix(), marks=slow)


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("page", [with_its_mark(page) for page in PAGES])
def test_every_python_block_runs_in_order(page, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    namespace: dict[str, object] = {"__name__": "readme"}
    python = blocks("python", page)
    assert python
    for number, block in enumerate(python):
        exec(compile(block, f"{page.name}, python block {number}", "exec"), namespace)


def test_every_test_that_the_api_page_names_exists():
    (page,) = (path.read_text("utf-8") for path in DOCS if path.name == "api.md")
    named = re.findall(r"`(?:tests/)?(?:\w+/)*(test_\w+\.py)::(test_\w+)`", page)
    assert len(named) > 10
    for file, test in named:
        sources = [p.read_text("utf-8") for p in (ROOT / "tests").rglob(file)]
        assert any(f"def {test}(" in source for source in sources), f"{file}::{test}"
    for path in re.findall(r"`(tests/[\w/.]+)`", page):
        assert (ROOT / path).exists(), path


def test_every_link_between_pages_leads_somewhere():
    links = [
        (page, target) for page in [README, *DOCS] for target in LINK.findall(page.read_text())
    ]
    assert len(links) > 20
    for page, target in links:
        assert (page.parent / target).exists(), f"{page.relative_to(ROOT)}: {target}"


def test_every_path_of_the_file_tree_exists():
    trees = [body for body in (*blocks(""), *blocks("text")) if "src/nemotron_v3/" in body]
    assert len(trees) == 1, "the README has one file tree, with src/nemotron_v3/ in it"
    paths = tree_paths(trees[0])
    assert len(paths) > 10
    assert [path for path in paths if not any(ROOT.glob(path))] == []


def test_the_tree_names_every_room():
    (tree,) = [body for body in (*blocks(""), *blocks("text")) if "src/nemotron_v3/" in body]
    package = ROOT / "src" / "nemotron_v3"
    rooms = {p.name for p in package.iterdir() if p.is_dir() and not p.name.startswith("_")}
    named = {Path(path).name for path in tree_paths(tree) if path.startswith("src/nemotron_v3/")}
    assert rooms - named == set()


def test_it_is_short():
    assert len(README.read_text("utf-8").splitlines()) <= LONGEST


@pytest.mark.parametrize(
    "tree",
    [
        "src/pkg/\n  a.py     about a/b\n  room/    x.py y.py\n    c.py   deep\ntests/\n",
        "src/pkg/\n├── a.py   about a/b\n├── room/  x.py y.py\n│   └── c.py  deep\ntests/\n",
    ],
)
def test_a_tree_is_read_as_paths(tree):
    expected = ["src/pkg/", "src/pkg/a.py", "src/pkg/room/", "src/pkg/room/c.py", "tests/"]
    assert tree_paths(tree) == expected
