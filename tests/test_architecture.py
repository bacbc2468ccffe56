"""The rules of the rooms: who may import whom, and where optional packages come in."""

import ast
import json
import re
import subprocess
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from fnmatch import fnmatch
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
PACKAGE = ROOT / "src" / "nemotron_v3"
LONGEST_FILE = 500


def rooms(names: str) -> frozenset[str]:
    return frozenset(names.split())


ROOMS = rooms(
    "config layout cache ops layers model checkpoint chat generation data adapters parallel verify "
    "train hf recipes cli"
)

# A room may import these and itself. "" is the package's own `__init__.py`, which only hands on
# public names; a room imports the room that has a name.
MAY_IMPORT: dict[str, frozenset[str]] = {
    "": rooms("config layout cache ops layers model checkpoint verify"),
    "config": rooms(""),
    "layout": rooms(""),
    "cache": rooms("config layout"),
    "ops": rooms("layout"),
    "layers": rooms("ops layout cache config"),
    "model": rooms("layers ops layout cache config"),
    "checkpoint": rooms("model config"),
    # Text alone, without a model or a tensor: training makes its examples with it as well as
    # generation its prompts. Of config it has the reading of files from outside.
    "chat": rooms("config"),
    # layers: a fast decode step asks whether a layer may be left uncalled, as layers and model do.
    "generation": rooms("model layers ops layout cache config chat"),
    "data": rooms("config layout"),
    "adapters": rooms("layers model ops config"),
    "parallel": rooms("model layers ops layout cache config"),
    "verify": rooms("model layers ops layout cache checkpoint generation config data"),
    "train": rooms("model parallel checkpoint data adapters verify layout config ops chat"),
    "hf": ROOMS - {"cli", "train", "recipes"},
    "recipes": ROOMS - {"cli", "hf"} | {""},
    "cli": ROOMS | {""},
}

# The methods of the model that hand over to the room above it, and the report's question to it.
MODEL_TO_GENERATION = frozenset({"generate", "score", "stream", "_generation"})

# Rooms of one device: what is spread over several is made from outside, in parallel.
WITHOUT_DISTRIBUTED = frozenset({"config", "layout", "cache", "ops", "layers", "model"})

# Third-party packages: where each may be imported (patterns of paths below the package).
ANYWHERE = ("*",)
HF_ROOM = ("hf/*",)
# A file of kernels may import triton at its top, because it is itself only imported in functions.
KERNELS = (
    *("ops/*/kernels.py", "ops/*/kernels/*.py"),
    *("ops/_early.py", "ops/_jit.py", "ops/_launch.py", "ops/_sums.py"),
)
PACKAGES: dict[str, tuple[str, ...]] = {
    "torch": ANYWHERE,
    "safetensors": ("checkpoint/*", "cache/file.py"),
    "tokenizers": ("data/*",),
    "rich": ("recipes/*", "train/*", "verify/*", "cli/*", "adapters/*"),
    "tyro": ("cli/*",),
    "jinja2": ("chat/worker.py",),
    "matplotlib": ("recipes/*", "train/*"),
    "datasets": ("data/*", "train/*"),
    "tensorboard": ("train/*",),
    "triton": ("ops/*/op.py", *KERNELS),
    "transformer_engine": ("ops/*/op.py", "layers/linear.py"),
    "transformers": HF_ROOM,
    "peft": HF_ROOM,
    "accelerate": HF_ROOM,
    "trl": HF_ROOM,
    "nemo_automodel": HF_ROOM,
}
OPTIONAL = frozenset({"triton", "transformer_engine"})


@dataclass(frozen=True)
class Import:
    """`target`, dotted and absolute; the functions it is imported in, outermost first."""

    target: str
    line: int
    functions: tuple[str, ...]


def matches(path: str, patterns: tuple[str, ...]) -> bool:
    return any(fnmatch(path, pattern) for pattern in patterns)


def imports(path: str, source: str) -> Iterator[Import]:
    """Every import of a file, those inside functions too; `path` is below the package."""

    def walk(node: ast.AST, functions: tuple[str, ...]) -> Iterator[Import]:
        match node:
            case ast.Import(names=names):
                for name in names:
                    yield Import(name.name, node.lineno, functions)
            case ast.ImportFrom(module=module, names=names, level=level):
                base = module or ""
                if level:
                    above = ["nemotron_v3", *path.split("/")[:-1]]
                    base = ".".join([*above[: len(above) - level + 1], base]).rstrip(".")
                for name in names:
                    yield Import(f"{base}.{name.name}", node.lineno, functions)
            case ast.Call(
                func=ast.Name(id="import_module" | "__import__")
                | ast.Attribute(attr="import_module"),
                args=[ast.Constant(value=str(target)), *_],
            ):
                yield Import(target, node.lineno, functions)
        match node:
            case ast.FunctionDef(name=name) | ast.AsyncFunctionDef(name=name):
                functions = (*functions, name)
            case ast.If(test=ast.Name(id="TYPE_CHECKING")):
                functions = (*functions, "TYPE_CHECKING")  # as little run as a function's body
        for child in ast.iter_child_nodes(node):
            yield from walk(child, functions)

    return walk(ast.parse(source), ())


def room_of(path: str) -> str:
    first = path.split("/")[0].removesuffix(".py")
    return "" if first == "__init__" else first


def broken_rules(path: str, source: str) -> list[str]:
    """What a file below the package does that its room may not, one line each."""
    room = room_of(path)
    if room not in MAY_IMPORT:
        return [f"{path}: the room {room!r} is not in the table: add it to architecture and here"]
    found = []
    for item in imports(path, source):
        package, *rest = item.target.split(".")
        if package == "nemotron_v3":
            problem = internal_problem(path, room, item, rest)
        elif package in sys.stdlib_module_names:
            problem = None
        else:
            problem = third_party_problem(path, room, item)
        if problem:
            found.append(f"{path}:{item.line}: imports {item.target}: {problem}")
    if room == "ops":
        found += [
            f"{path}:{node.lineno}: {node.name} is an nn.Module: ops are functions on tensors"
            for node in ast.walk(ast.parse(source))
            if isinstance(node, ast.ClassDef)
            and any(ast.unparse(base).split(".")[-1] == "Module" for base in node.bases)
        ]
    return found


def internal_problem(path: str, room: str, item: Import, rest: list[str]) -> str | None:
    target = rest[0] if rest and rest[0] in ROOMS else ""
    of_kernels = matches("/".join(rest) + ".py", KERNELS) or "kernels" in rest[:-1]
    if of_kernels and not item.functions and not matches(path, KERNELS):
        return "kernels are imported inside a function, since they need triton"
    if room == target == "ops":
        return op_problem(path, rest)
    if target == room:
        return None
    if room == "model" and target == "generation":
        inside = item.functions and item.functions[-1] in MODEL_TO_GENERATION
        return None if inside else f"only inside {sorted(MODEL_TO_GENERATION)}"
    if target not in MAY_IMPORT[room]:
        name = target or "the package itself (import the room that has the name)"
        return f"{room or '__init__'} may not import {name}"
    if path == "cli/main.py" and target and not item.functions:
        return "the command line imports a verb only when it is asked for, so that help is quick"
    return None


def op_problem(path: str, rest: list[str]) -> str | None:
    """Inside ops: a file sees its own op, the files that all ops share, and other ops' op.py. An
    op made of others, or a case of another, writes each form with the same form of theirs."""
    own, mine = [*path.removesuffix(".py").split("/"), ""][1:3]  # kernels/x.py is of kernels
    if len(rest) < 2:
        return "import another op from its op.py"
    other, form = rest[1], ".".join(rest[2:3])
    shared = (PACKAGE / "ops" / f"{other}.py").is_file()
    same_form = form in ("reference", "cases", "kernels") and mine == form
    same_form = same_form or (form.startswith("portable") and mine == "portable")
    if other == own or shared or form == "op" or same_form:
        return None
    return f"only {other}/op.py may be imported by another op"


def third_party_problem(path: str, room: str, item: Import) -> str | None:
    package = item.target.split(".")[0]
    if package not in PACKAGES:
        return "not among the package's dependencies: declare it in pyproject.toml and here"
    if not matches(path, PACKAGES[package]):
        return f"{package} may only be imported in {', '.join(PACKAGES[package])}"
    if package in OPTIONAL and not item.functions and not matches(path, KERNELS):
        return f"{package} is optional: import it inside a function"
    if f"{item.target}.".startswith("torch.distributed.") and room in WITHOUT_DISTRIBUTED:
        return f"{room} knows one device: what is distributed comes from parallel"
    return None


FILES = sorted(p.relative_to(PACKAGE).as_posix() for p in PACKAGE.rglob("*.py"))


@pytest.mark.parametrize("path", FILES)
def test_a_file_imports_only_what_its_room_may(path):
    assert broken_rules(path, (PACKAGE / path).read_text(encoding="utf-8")) == []


@pytest.mark.parametrize(
    ("path", "source", "message"),
    [
        ("config.py", "from nemotron_v3.layout import L", "config may not import layout"),
        ("layout.py", "import nemotron_v3.config", "layout may not import config"),
        ("ops/ssd/op.py", "from nemotron_v3.config import X", "ops may not import config"),
        ("ops/ssd/op.py", "import nemotron_v3.ops.attention.portable", "only attention/op.py"),
        ("ops/ssd/op.py", "from ..attention.portable import f", "only attention/op.py"),
        ("ops/ssd/op.py", "import triton", "import it inside a function"),
        ("ops/ssd/op.py", "from nemotron_v3.ops.ssd.kernels import f", "inside a function"),
        ("ops/ssd/portable.py", "def f():\n  import triton", "may only be imported in"),
        ("ops/ssd/op.py", "class A(torch.nn.Module): pass", "ops are functions on tensors"),
        ("layers/moe.py", "import torch.distributed as dist", "layers knows one device"),
        ("layers/moe.py", "def f():\n  from torch.distributed import get_rank", "one device"),
        ("layers/moe.py", "from nemotron_v3 import NemotronV3Model", "import the room"),
        ("layers/moe.py", "from nemotron_v3 import model", "layers may not import model"),
        ("layers/moe.py", "from .. import parallel", "layers may not import parallel"),
        ("model/model.py", "from nemotron_v3.generation import f", "only inside"),
        ("model/model.py", "def load():\n  from nemotron_v3.generation import f", "only inside"),
        ("checkpoint/read.py", "def f():\n  import transformers", "may only be imported in hf"),
        ("data/x.py", "def f():\n  from nemotron_v3.model import M", "data may not import model"),
        ("train/loop.py", "import nemotron_v3.generation", "train may not import generation"),
        ("recipes/demo.py", "from nemotron_v3.hf import register", "recipes may not import hf"),
        ("recipes/demo.py", "import pandas", "not among the package's dependencies"),
        ("cli/main.py", "from nemotron_v3.recipes.demo import run", "only when it is asked for"),
        ("hf/register.py", "import nemotron_v3.cli.main", "hf may not import cli"),
        ("extras/x.py", "", "the room 'extras' is not in the table"),
        ("data/x.py", "import importlib\nimportlib.import_module('nemotron_v3.model')", "may not"),
    ],
)
def test_a_broken_rule_is_found(path, source, message):
    found = broken_rules(path, source)
    assert len(found) == 1 and message in found[0]


@pytest.mark.parametrize(
    ("path", "source"),
    [
        ("ops/ssd/op.py", "def f():\n  import triton\n  from nemotron_v3.ops.ssd import kernels"),
        ("ops/ssd/kernels.py", "import triton\nimport triton.language as tl"),
        ("ops/mamba2/reference.py", "from nemotron_v3.ops.ssd.reference import ssd"),
        ("ops/rms_norm/kernels.py", "from nemotron_v3.ops.gated_rms_norm.kernels import norm"),
        ("ops/mamba2/portable.py", "from nemotron_v3.ops.ssd.op import ssd"),
        ("ops/mamba2/portable.py", "from nemotron_v3.ops.ssd.portable_backward import backward"),
        ("model/model.py", "class M:\n  def generate(self):\n    import nemotron_v3.generation"),
        ("layers/linear.py", "def f():\n  import transformer_engine.pytorch as te"),
        ("hf/register.py", "import transformers\nfrom nemotron_v3.model import M"),
        ("cli/demo.py", "from nemotron_v3.recipes.demo import run"),
        ("cli/main.py", "def main():\n  from nemotron_v3.recipes.demo import run"),
        ("parallel/x.py", "import torch.distributed"),
    ],
)
def test_what_the_table_allows_is_allowed(path, source):
    assert broken_rules(path, source) == []


def test_importing_the_package_loads_nothing_but_torch_and_safetensors():
    script = """
import json, sys
import safetensors.torch, torch
before = set(sys.modules)
import nemotron_v3
print(json.dumps(sorted({name.partition(".")[0] for name in set(sys.modules) - before})))
"""
    done = subprocess.run(
        [sys.executable, "-W", "error", "-c", script], capture_output=True, text=True, check=True
    )
    loaded = set(json.loads(done.stdout)) - set(sys.stdlib_module_names)
    # torch brings in packages of its own as more of it is used; ours are the ones that matter.
    ours = {*PACKAGES, "numpy"} - {"torch", "safetensors"}
    assert loaded & ours == set()
    assert done.stderr == ""


def test_no_file_is_too_long():
    folders = [ROOT / name for name in ("src", "tests", "benchmarks")]
    lines = {
        str(path.relative_to(ROOT)): len(path.read_text(encoding="utf-8").splitlines())
        for folder in folders
        for path in folder.rglob("*.py")
    }
    assert {path: n for path, n in lines.items() if n > LONGEST_FILE} == {}


def test_dependencies_are_the_ones_of_the_table():
    text = (ROOT / "pyproject.toml").read_text(encoding="utf-8")
    declared = re.search(r"^dependencies = \[(.*?)^\]", text, re.MULTILINE | re.DOTALL)
    names = set(re.findall(r'"([a-z0-9_-]+)', declared.group(1)))
    assert names == {
        "torch", "safetensors", "jinja2", "tokenizers", "rich", "tyro", "matplotlib",
    }  # fmt: skip
