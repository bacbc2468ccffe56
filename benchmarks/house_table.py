"""The measures of the house before and after, in one table.

    python -m benchmarks.house_table REVISION [--new FOLDER ...]

`REVISION` is checked out into a temporary worktree; both packages are measured by the same code,
each in a process of its own (`benchmarks.house`), and their types by the same pyright. `--new`
names folders and files of the package that other work has added since, as `train` or
`checkpoint/narrow`: their lines are told apart from the rest. The last line is the same as JSON.
"""

import argparse
import ast
import json
import os
import re
import shutil
import subprocess
import sys
import tempfile
from collections import Counter
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from benchmarks.measure import ROOT
from tests.moved_tests import collect

HOOKS = re.compile(r"_(?:forward|backward)(?:_pre)?_hooks")
IGNORE = re.compile(r"#\s*(?:pyright|type):\s*ignore")
KERNELS = re.compile(r"ops/(?:.*/)?kernels(?:\.py|/)|ops/(?:.*/)?_?(?:jit|launch|sums)\.py")


def pyright(*arguments: str, folder: Path) -> dict[str, Any]:
    """What pyright says in JSON, run in `folder` with the environment of this process."""
    environment = os.environ | {"VIRTUAL_ENV": sys.prefix, "PYTHONPATH": str(folder / "src")}
    environment["PATH"] = f"{Path(sys.executable).parent}:{environment['PATH']}"
    command = ["pyright", "--outputjson", *arguments]
    done = subprocess.run(command, cwd=folder, env=environment, capture_output=True, text=True)
    return json.loads(done.stdout)


def types(tree: Path) -> dict[str, Any]:
    """Errors of pyright's basic mode, no file left out; how complete the public types are."""
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        shutil.copytree(tree / "src", folder / "src")
        settings = {"include": ["src"], "typeCheckingMode": "basic", "pythonVersion": "3.11"}
        (folder / "pyrightconfig.json").write_text(json.dumps(settings))
        found = pyright("--pythonpath", sys.executable, folder=folder)["generalDiagnostics"]
        verified = pyright("--verifytypes", "nemotron_v3", "--ignoreexternal", folder=folder)
    errors = [each["file"] for each in found if each["severity"] == "error"]
    inside = sum(KERNELS.search(file) is not None for file in errors)
    return {
        "errors outside kernels": len(errors) - inside,
        "errors in kernels": inside,
        "complete": round(verified["typeCompleteness"]["completenessScore"], 3),
    }


def lines_by_room(package: Path, new: Sequence[str]) -> dict[str, int]:
    """Source lines of each room, and of what is `new` by its own name."""
    lines: Counter[str] = Counter()
    for path in package.rglob("*.py"):
        below = path.relative_to(package).as_posix()
        added = next((n for n in new if below == n or below.startswith(f"{n}/")), None)
        room = below.split("/")[0] if "/" in below else "."
        lines[f"new: {added}" if added else room] += len(path.read_text("utf-8").splitlines())
    return dict(sorted(lines.items()))


def hook_readers(package: Path) -> list[str]:
    """Functions that look at a module's or at the global hooks: each a predicate of its own."""
    found = []
    for path in sorted(package.rglob("*.py")):
        for node in ast.walk(ast.parse(path.read_text("utf-8"))):
            if isinstance(node, ast.FunctionDef) and HOOKS.search(ast.unparse(node)):
                found.append(f"{path.relative_to(package)}:{node.name}")
    return found


def measure(tree: Path, new: Sequence[str]) -> dict[str, Any]:
    package = tree / "src" / "nemotron_v3"
    command = [sys.executable, "-m", "benchmarks.house", "--source", str(tree / "src")]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=True)
    walked = json.loads(done.stdout)
    lines = lines_by_room(package, new)
    ignores = [IGNORE.findall(path.read_text("utf-8")) for path in package.rglob("*.py")]
    checked = types(tree)
    rows: dict[str, Any] = {}
    for name, counts in walked["passes"].items():
        rows[f"calls, {name}: all"] = counts["calls"]
        rows[f"calls, {name}: border, choice of form, modules"] = counts["around"]
        rows[f"calls, {name}: files of that part"] = counts["files around"]
    rows["import circles"] = len(walked["import cycles"])
    rows["pyright errors outside kernels"] = checked["errors outside kernels"]
    rows["pyright errors in kernels"] = checked["errors in kernels"]
    rows["ignores of a type checker"] = sum(map(len, ignores))
    rows["public types that are complete"] = checked["complete"]
    rows["bare-argument lines of kernel files"] = walked["bare argument lines of kernels"]
    for name, count in lines.items():
        rows[f"source lines, {name}"] = count
    rows["source lines, without what is new"] = sum(
        count for name, count in lines.items() if not name.startswith("new: ")
    )
    rows["handlers that undo a failed pass"] = len(walked["handlers of BaseException"])
    rows["functions that look at hooks"] = len(hook_readers(package))
    rows["tests collected, long ones included"] = len(collect(tree))
    return rows


def render(before: dict[str, Any], after: dict[str, Any], revision: str) -> str:
    table = [f"| measure | {revision} | now |", "|---|--:|--:|"]
    for name in dict.fromkeys([*before, *after]):
        table.append(f"| {name} | {before.get(name, '-')} | {after.get(name, '-')} |")
    return "\n".join(table)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("revision", help="what to compare with")
    parser.add_argument("--new", nargs="*", default=[], metavar="FOLDER", help="of other work")
    options = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        tree = Path(folder) / "tree"
        git = ("git", "-C", str(ROOT), "worktree")
        subprocess.run([*git, "add", "--detach", str(tree), options.revision], check=True)
        try:
            before = measure(tree, options.new)
        finally:
            subprocess.run([*git, "remove", "--force", str(tree)], check=True)
    after = measure(ROOT, options.new)
    print(render(before, after, options.revision))
    print(json.dumps({"before": before, "after": after}))


if __name__ == "__main__":
    main()
