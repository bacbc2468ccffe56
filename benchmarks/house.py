"""How far a reader walks: the calls and files of a forward pass, the lines and cycles of a package.

    python -m benchmarks.house                  this checkout
    python -m benchmarks.house --source DIR     the package that lies in DIR, another checkout's src

A language model of one block takes 2 x 16 tokens on a CPU, and its second call is counted: every
call of a Python function of the package, by `sys.setprofile`. Python 3.12 counts comprehensions no
more, so compare figures of one version of Python.
"""

import argparse
import ast
import json
import os
import re
import subprocess
import sys
from collections import Counter
from collections.abc import Callable, Collection, Iterator
from functools import partial
from pathlib import Path
from types import FrameType
from typing import Any

ROOT = Path(__file__).parents[1]
BLOCKS = {"mamba": "M", "moe": "E", "attention": "*", "mlp": "-"}
COMPREHENSIONS = ("<listcomp>", "<genexpr>", "<dictcomp>", "<setcomp>")
# Files of ops that choose which implementation runs; the others, the ops themselves, compute.
CHOOSES = ("_dispatch.py", "_triton.py", "registry.py", "compat.py")


def calls_of(run: Callable[[], Any], package: Path) -> list[tuple[str, str]]:
    """File below the package and name of every function of it that `run` calls, in order."""
    calls: list[tuple[str, str]] = []
    prefix = f"{package}/"

    def see(frame: FrameType, event: str, _: Any) -> None:
        file = frame.f_code.co_filename
        if event == "call" and file.startswith(prefix):
            calls.append((file.removeprefix(prefix), frame.f_code.co_name))

    sys.setprofile(see)
    try:
        run()
    finally:
        sys.setprofile(None)
    return calls


def summary(calls: list[tuple[str, str]]) -> dict[str, int]:
    """The columns of a row: calls in all and of each part, functions, files, changes of file."""
    parts = [_part(file, name) for file, name in calls]
    around = [file for (file, _), part in zip(calls, parts, strict=True) if part == "around"]
    files = [file for file, _ in calls]
    return {
        "calls": len(calls),
        "functions": len(set(calls)),
        "files": len(set(files)),
        "changes of file": sum(a != b for a, b in zip(files, files[1:], strict=False)),
        "around": len(around),
        "files around": len(set(around)),
        "inside ops": parts.count("ops"),
        "comprehensions": parts.count("comprehension"),
    }


def _part(file: str, name: str) -> str:
    if name in COMPREHENSIONS:
        return "comprehension"
    computes = file.startswith("ops/") and file.rsplit("/", 1)[-1] not in CHOOSES
    return "ops" if computes else "around"


def forward_passes() -> dict[str, Callable[[], Any]]:
    """The calls to count, each called once already: what a first call alone does is not counted."""
    import torch

    from nemotron_v3 import NemotronHybridCache, NemotronV3Config, NemotronV3ForCausalLM

    sizes = {
        "vocab_size": 64, "hidden_size": 64, "num_attention_heads": 4, "num_key_value_heads": 2,
        "head_dim": 16, "mamba_num_heads": 8, "mamba_head_dim": 8, "ssm_state_size": 16,
        "n_groups": 2, "chunk_size": 16, "intermediate_size": 64, "n_routed_experts": 8,
        "num_experts_per_tok": 2, "moe_intermediate_size": 32,
        "moe_shared_expert_intermediate_size": 32,
    }  # fmt: skip
    runs: dict[str, Callable[[], Any]] = {}
    ids = torch.arange(32).view(2, 16)
    for name, pattern in BLOCKS.items():
        config = NemotronV3Config(hybrid_override_pattern=pattern, **sizes)
        model = NemotronV3ForCausalLM(config).eval()
        runs[name] = partial(model, ids)
        if name in ("mamba", "attention"):
            cache = NemotronHybridCache(config, 2)
            runs[f"decode, one token, {name}"] = partial(model, ids[:, :1], past_key_values=cache)
    runs = {name: torch.no_grad()(run) for name, run in runs.items()}
    for run in runs.values():
        run()
    return runs


def source_lines(package: Path) -> int:
    return sum(len(p.read_text(encoding="utf-8").splitlines()) for p in package.rglob("*.py"))


def cycles(package: Path) -> list[list[str]]:
    """Modules that import each other, in functions and for types too: strong components."""
    modules = _modules(package)
    graph = {name: set(_imports(path, modules)) - {name} for name, path in modules.items()}
    return [sorted(part) for part in _components(graph) if len(part) > 1]


def _modules(package: Path) -> dict[str, Path]:
    found = {}
    for path in package.rglob("*.py"):
        parts = [package.name, *path.relative_to(package).with_suffix("").parts]
        found[".".join(parts[:-1] if parts[-1] == "__init__" else parts)] = path
    return found


def _imports(path: Path, modules: Collection[str]) -> Iterator[str]:
    """Modules of the package that a file names; a package's own `__init__` only where it is asked
    for a name that is no module."""
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        targets = []
        if isinstance(node, ast.Import):
            targets = [alias.name for alias in node.names]
        elif isinstance(node, ast.ImportFrom) and not node.level:
            base = node.module or ""
            targets = [
                f"{base}.{alias.name}" if f"{base}.{alias.name}" in modules else base
                for alias in node.names
            ]
        yield from (target for target in targets if target in modules)


def _components(graph: dict[str, set[str]]) -> list[set[str]]:
    """Tarjan's strongly connected components."""
    index: dict[str, int] = {}
    low: dict[str, int] = {}
    stack: list[str] = []
    found: list[set[str]] = []

    def visit(node: str) -> None:
        index[node] = low[node] = len(index)
        stack.append(node)
        for other in graph[node]:
            if other not in index:
                visit(other)
                low[node] = min(low[node], low[other])
            elif other in stack:
                low[node] = min(low[node], index[other])
        if low[node] == index[node]:
            part = set()
            while not part or node not in part:
                part.add(stack.pop())
            found.append(part)

    for node in graph:
        if node not in index:
            visit(node)
    return found


def bare_argument_lines(package: Path) -> tuple[int, int]:
    """Lines of kernel files that hold one name of an argument and nothing else, and all lines."""
    bare = re.compile(r"^\s*(\w+(: [\w.| ]+)?|(\w+)=\3),$")
    files = [*package.glob("ops/*/kernels.py"), *package.glob("ops/*/kernels/*.py")]
    lines = [line for p in files for line in p.read_text(encoding="utf-8").splitlines()]
    return sum(bool(bare.match(line)) for line in lines), len(lines)


def undoing(package: Path) -> list[str]:
    """Where a failed pass is undone: handlers of BaseException in the rooms of the model."""
    found = []
    for room in ("layers", "model", "cache", "generation"):
        for path in sorted((package / room).rglob("*.py")):
            for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
                kind = node.type if isinstance(node, ast.ExceptHandler) else None
                if isinstance(kind, ast.Name) and kind.id == "BaseException":
                    found.append(f"{path.relative_to(package)}:{node.lineno}")
    return found


def measures(package: Path) -> dict[str, Any]:
    bare, lines = bare_argument_lines(package)
    result = {
        "passes": {n: summary(calls_of(run, package)) for n, run in forward_passes().items()},
        "source lines": source_lines(package),
        "import cycles": cycles(package),
        "handlers of BaseException": undoing(package),
        "bare argument lines of kernels": f"{bare} of {lines}, {bare / lines:.1%}",
    }
    return result


def listing(package: Path, name: str) -> Counter[str]:
    """The functions of one pass and how often each is called."""
    calls = calls_of(forward_passes()[name], package)
    return Counter(f"{_part(file, function):<14} {file}:{function}" for file, function in calls)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--source", type=Path, help="the folder that holds nemotron_v3")
    parser.add_argument("--list", metavar="PASS", help="list the calls of one pass")
    options = parser.parse_args()
    if options.source is not None:  # in a process of its own, which has imported nothing yet
        rest = ["--list", options.list] if options.list else []
        env = os.environ | {"PYTHONPATH": f"{options.source.resolve()}:{ROOT}"}
        command = [sys.executable, "-m", "benchmarks.house", *rest]
        sys.exit(subprocess.run(command, cwd=ROOT, env=env, check=False).returncode)
    import nemotron_v3

    package = Path(nemotron_v3.__file__).parent
    if options.list:
        for line, count in listing(package, options.list).items():
            print(f"{count:4} {line}")
        return
    print(json.dumps({"package": str(package)} | measures(package), indent=1))


if __name__ == "__main__":
    main()
