"""The pages: README, docs/ and the READMEs in folders name files and tests that are there."""

import re
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
PACKAGE = ROOT / "src" / "nemotron_v3"
# Dated notes keep the names of their day.
HISTORY = {"log.md", "CHANGELOG.md"}
PAGES = {
    path.relative_to(ROOT).as_posix(): path
    for folder in (ROOT / "docs", ROOT / "src", ROOT / "tests", ROOT / "benchmarks", ROOT)
    for path in (folder.glob("*.md") if folder == ROOT else folder.rglob("*.md"))
}
CODE = re.compile(r"(?<!`)`([^`\n]+)`(?!`)")
FILE = re.compile(r"(?:[\w.*-]+/)*[\w.*-]+\.(?:py|md|ipynb|toml|txt)")
FOLDER = re.compile(r"(?:[\w.-]+/)+[\w-]*")
TEST = re.compile(r"((?:[\w.-]+/)*test_\w+\.py)::(test_\w+)")


def prose(path: Path) -> str:
    """A page without its blocks of code."""
    return re.sub(r"^```.*?^```", "", path.read_text("utf-8"), flags=re.MULTILINE | re.DOTALL)


def places(name: str, page: Path) -> list[Path]:
    """What a name on a page may mean: a path from the root, the package, the tests or the page's
    folder; of a file named without its folder, any of that name."""
    name = name.rstrip("/")
    folders = (ROOT, PACKAGE, ROOT / "tests", page.parent)
    found = [path for folder in folders for path in folder.glob(name)]
    if not found and "/" not in name:
        searched = (PACKAGE, *(ROOT / part for part in ("tests", "docs", "benchmarks", "examples")))
        found = [path for folder in searched for path in folder.rglob(name)]
    return found


def of_ours(name: str) -> bool:
    """Whether a name with folders begins with one of ours; another project's files do not."""
    rooms = {path.name for path in PACKAGE.iterdir() if path.is_dir()}
    tops = {"src", "tests", "docs", "benchmarks", "examples"}
    return name.split("/")[0] in rooms | tops


def missing(text: str, page: Path) -> list[str]:
    names = CODE.findall(text)
    files = [n for n in names if FILE.fullmatch(n) and (of_ours(n) or n.endswith(".py"))]
    folders = [n for n in names if FOLDER.fullmatch(n) and of_ours(n)]
    gone = [name for name in (*files, *folders) if not places(name, page)]
    for file, test in TEST.findall(" ".join(names)):
        sources = [path.read_text("utf-8") for path in places(file, page)]
        if not any(f"def {test}(" in source for source in sources):
            gone.append(f"{file}::{test}")
    return gone


@pytest.mark.parametrize("page", sorted(n for n, p in PAGES.items() if p.name not in HISTORY))
def test_every_file_and_test_that_a_page_names_exists(page):
    assert missing(prose(PAGES[page]), PAGES[page]) == []


@pytest.mark.parametrize(
    "name",
    [
        *("`layers/gone.py`", "`tests/gone/`", "`ops/gone`", "`gone.py`", "`docs/gone.md`"),
        "`test_pages.py::test_gone`",
    ],
)
def test_what_is_gone_is_found(name):
    assert missing(f"see {name}.", ROOT / "README.md") == [name.strip("`")]


def test_a_name_that_a_page_gives_to_the_code_stands_in_it():
    code = "\n".join(path.read_text("utf-8") for path in PACKAGE.rglob("*.py"))
    words = set(re.findall(r"\w+", code))
    claims = [
        (page, name)
        for page, path in PAGES.items()
        for name in re.findall(r"`(\w+)` in (?:the )?code\b", path.read_text("utf-8"))
    ]
    assert ("docs/notation.md", "dy") in claims
    assert [claim for claim in claims if claim[1] not in words] == []


NUMBERS = {"Two": 2, "Three": 3, "Four": 4, "Five": 5, "Six": 6}
COUNTED = re.compile(
    rf"^[^\n]*\b({'|'.join(NUMBERS)})\b[^\n]*:\n\n((?:(?:- |\d\. ).*\n(?:  .*\n)*\n?)+)",
    re.MULTILINE,
)


def test_a_list_has_as_many_entries_as_its_page_counts():
    lists = [(page, *found) for page in PAGES for found in COUNTED.findall(prose(PAGES[page]))]
    assert len(lists) >= 2
    for page, number, entries in lists:
        count = len(re.findall(r"^(?:- |\d\. )", entries, re.MULTILINE))
        assert count == NUMBERS[number], f"{page}: {number} of {count}"


def test_the_pages_are_found_wherever_they_lie():
    kinds = [name.split("/")[0] for name in PAGES]
    assert kinds.count("docs") > 10 and kinds.count("src") > 8
    assert "README.md" in PAGES and "docs/api.md" in PAGES
