"""Docstrings: legends give a letter one meaning, and sections are indented as they are read."""

import ast
import re
from pathlib import Path

ROOT = Path(__file__).parents[1]
PACKAGE = ROOT / "src" / "nemotron_v3"
SECTION = re.compile(r"( *)(?:Args|Attributes|Raises):")
# A name or several, or an exception, and what it is; names may go on in the next line.
ENTRY = re.compile(r" *[*\w][\w*., `/()\[\]'|-]*(?:: ?.*|,)")
DEFINED = re.compile(r"(?:^|[,;:] |and )([A-Z])(?=[ ,=])")


def docstrings(path: Path) -> list[str]:
    kinds = (ast.Module, ast.ClassDef, ast.FunctionDef, ast.AsyncFunctionDef)
    tree = ast.parse(path.read_text("utf-8"))
    found = (ast.get_docstring(node) for node in ast.walk(tree) if isinstance(node, kinds))
    return [text for text in found if text]


def twice_defined(docstring: str) -> list[str]:
    """The letters that a docstring's legend (the paragraph behind `Letters:`) gives twice."""
    match = re.search(r"^Letters: (.*?)(?:\n\n|\Z)", docstring, re.MULTILINE | re.DOTALL)
    legend = " ".join(match[1].split()) if match else ""
    legend = re.sub(r"`[^`]*`", "", legend.split(". ")[0])  # formulas; what follows is prose
    letters = DEFINED.findall(legend)
    return [letter for letter in letters if letters.count(letter) > 1]


def badly_indented(docstring: str) -> list[str]:
    """The lines in a section that stand where an entry begins and begin none."""
    wrong: list[str] = []
    depth: int | None = None
    for line in filter(str.strip, docstring.splitlines()):
        indent = len(line) - len(line.lstrip())
        if match := SECTION.fullmatch(line):
            depth = len(match[1])
        elif depth is not None and indent <= depth:
            depth = None
        elif depth is not None and indent == depth + 4 and not ENTRY.fullmatch(line):
            wrong.append(line)
    return wrong


FILES = sorted(path.relative_to(PACKAGE).as_posix() for path in PACKAGE.rglob("*.py"))


def test_no_legend_gives_a_letter_twice():
    found = [
        (path, letters)
        for path in FILES
        for text in docstrings(PACKAGE / path)
        if (letters := twice_defined(text))
    ]
    assert found == []


def test_entries_of_a_section_go_on_behind_an_indent():
    found = [
        (path, lines)
        for path in FILES
        for text in docstrings(PACKAGE / path)
        if (lines := badly_indented(text))
    ]
    assert found == []


def test_what_is_wrong_is_found():
    assert twice_defined("A file.\n\nLetters: B rows, D width; mamba: D documents.") == ["D", "D"]
    assert twice_defined("Letters: B rows, C = `B D` channels. B is a tensor, D another.") == []
    wrong = "Do.\n\nArgs:\n    x: a thing; None takes it from\n    `config`.\n    y: another."
    assert badly_indented(wrong) == ["    `config`."]
    assert badly_indented(wrong.replace("    `config`", "        `config`")) == []
