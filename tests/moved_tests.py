"""Which tests of an older revision are gone: `python tests/moved_tests.py REVISION [MAP ...]`.

Both trees are collected by pytest, heavy and integration tests included. A test is counted by its
function and by its parameters, without those that are the path of a file: a moved file changes the
path and not what is checked. A line of a map says under which name a test goes on,

    tests/test_layout.py -> tests/layout/test_sequence.py
    tests/cache/test_decode.py::test_old_name -> tests/cache/test_decode.py::test_new_name
    tests/cache/test_decode.py::test_old_name[5-x] -> tests/cache/test_decode.py::test_new_name[x]

or, after `->` and `gone:`, why it is no more. Lines that start with `#` are comments, and maps in
Markdown may have other lines. It prints each test that has no successor, and exits with 1.
"""

import os
import re
import subprocess
import sys
import tempfile
from collections import Counter
from pathlib import Path

ROOT = Path(__file__).parents[1]
PATH = re.compile(r"[\w./-]+\.(?:py|md)")
LINE = re.compile(r"[\s*`-]*(tests/.*?)`?\s+->\s+`?(gone: .+|tests/.*?)`?\s*")
GONE = "gone: "


def collect(tree: Path) -> list[str]:
    """The id of every test in a tree."""
    command = [sys.executable, "-m", "pytest", "--collect-only", "-q", "-m", "", "tests"]
    environment = {**os.environ, "PYTHONPATH": str(tree / "src")}
    done = subprocess.run(command, cwd=tree, env=environment, capture_output=True, text=True)
    if done.returncode:
        raise SystemExit(f"{tree} is not collected:\n{done.stdout[-2000:]}")
    return [line for line in done.stdout.splitlines() if line.startswith("tests/")]


def collect_at(revision: str) -> list[str]:
    """The id of every test in a revision, collected in a worktree that is removed again."""
    with tempfile.TemporaryDirectory() as folder:
        tree = Path(folder) / "tree"
        git = ("git", "-C", str(ROOT), "worktree")
        subprocess.run([*git, "add", "--detach", str(tree), revision], check=True)
        try:
            return collect(tree)
        finally:
            subprocess.run([*git, "remove", "--force", str(tree)], check=True)


def read_map(text: str) -> dict[str, str]:
    matches = (LINE.fullmatch(line) for line in text.splitlines() if not line.startswith("#"))
    return {match[1]: match[2] for match in matches if match}


def without_paths(test: str) -> str:
    """A test's id without parameters that are paths."""
    function, bracket, parameters = test.partition("[")
    return (
        function
        if PATH.fullmatch(parameters.removesuffix("]"))
        else function + bracket + parameters
    )


def renamed(test: str, moves: dict[str, str]) -> str:
    """The name that a test goes on under: by its id, its function or its file, in this order."""
    function, bracket, parameters = test.partition("[")
    file, colons, name = function.partition("::")
    if test in moves:
        return moves[test]
    if function in moves:
        return (
            moves[function] if GONE in moves[function] else moves[function] + bracket + parameters
        )
    if file in moves:
        return (
            moves[file]
            if GONE in moves[file]
            else moves[file] + colons + name + bracket + parameters
        )
    return test


def lost(before: list[str], after: list[str], moves: dict[str, str]) -> list[str]:
    """The tests of before that have no successor. Tests that differ in paths alone count as one:
    how many files there are is no matter of theirs."""
    there = Counter(map(without_paths, after))
    return [
        test
        for test in dict.fromkeys(map(without_paths, before))
        if there[name := renamed(test, moves)] == 0 and not name.startswith(GONE)
    ]


def main(revision: str, maps: list[str]) -> int:
    moves: dict[str, str] = {}
    for path in maps:
        moves |= read_map(Path(path).read_text("utf-8"))
    before, after = collect_at(revision), collect(ROOT)
    gone = lost(before, after, moves)
    for test in gone:
        print(test)
    renames = sum(not name.startswith(GONE) for name in moves.values())
    print(
        f"{len(before)} tests at {revision}, {len(after)} now; {renames} lines of renames, "
        f"{len(moves) - renames} of removals; {len(gone)} without a successor"
    )
    return 1 if gone else 0


if __name__ == "__main__":
    if len(sys.argv) < 2:
        raise SystemExit(__doc__)
    raise SystemExit(main(sys.argv[1], sys.argv[2:]))
