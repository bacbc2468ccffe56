"""The rules of the rooms: who may import whom, and where optional packages come in."""

import ast
import re
import subprocess
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from fnmatch import fnmatch
from pathlib import Path

import pytest

from benchmarks.house import cycles

ROOT = Path(__file__).parents[1]
PACKAGE = ROOT / "src" / "nemotron_v3"
LONGEST_FILE = 500


def rooms(names: str) -> frozenset[str]:
    return frozenset(names.split())


ROOMS = rooms(
    "config layout cache ops layers model checkpoint chat generation data adapters parallel "
    "pages train evaluation hf nemo recipes cli"
)

# A room may import these and itself. "" is the package's own `__init__.py`, which only hands on
# public names; a room imports the room that has a name.
MAY_IMPORT: dict[str, frozenset[str]] = {
    "": rooms("config layout cache ops layers model checkpoint"),
    "config": rooms(""),
    "layout": rooms(""),
    "cache": rooms("config layout"),
    "ops": rooms("layout"),
    "layers": rooms("ops layout cache config"),
    "model": rooms("layers ops layout cache config"),
    # layers: the values of weights in 8 or 4 bits, which layers that hold such weights take too.
    "checkpoint": rooms("model layers config"),
    # Text alone, without a model or a tensor: training makes its examples with it as well as
    # generation its prompts. Of config it has the reading of files from outside.
    "chat": rooms("config"),
    # layers: a fast decode step asks whether a layer may be left uncalled, as layers and model do.
    "generation": rooms("model layers ops layout cache config chat"),
    # chat: training makes its examples with the templates that generation makes its prompts with.
    "data": rooms("config layout chat"),
    "adapters": rooms("layers model ops config"),
    "parallel": rooms("model layers ops layout cache config"),
    # Files in, a file out: what a page shows is read from the folder that it is of, so that a run
    # of last year has one too. (`nemotron_v3.report` is a function of the model room.)
    "pages": rooms("config"),
    # layers: the loads of experts and their balance, which a step moves. Adapters that PEFT puts on
    # are handed in by the command line. pages: a run writes the page that shows it.
    "train": rooms("model layers parallel checkpoint data adapters layout config ops chat pages"),
    # generation: a score's log-probabilities, and answers of tasks. train: the processes that
    # torchrun has made, and the signals that ask them to end. pages: what a page is made of.
    "evaluation": rooms("model layout cache checkpoint generation data config chat train pages"),
    "hf": ROOMS - {"cli", "train", "recipes", "nemo", "pages"},
    # Not hf: NeMo AutoModel pins a transformers of its own, which hf may not take. parallel: its
    # parallelizers share the tokens of a document between processes.
    "nemo": rooms("layers ops layout parallel"),
    "recipes": ROOMS - {"cli", "hf", "nemo"} | {""},
    "cli": ROOMS | {""},
    "__main__": rooms("cli"),
}

# The methods of the model that hand over to the room above it, and the report's question to it.
MODEL_TO_GENERATION = frozenset({"generate", "score", "stream", "_generation"})

# Files of options alone, which import neither torch nor a room: help needs them.
OPTIONS = re.compile(r"(recipes|train|data|evaluation)\.(options|config_file)(\.\w+)?")

# Rooms of one device: what is spread over several is made from outside, in parallel.
WITHOUT_DISTRIBUTED = frozenset({"config", "layout", "cache", "ops", "layers", "model"})

# Third-party packages: where each may be imported (patterns of paths below the package).
ANYWHERE = ("*",)
HF_ROOM = ("hf/*",)
# A file of kernels may import triton at its top, because it is itself only imported in functions.
KERNELS = (
    *("ops/*/kernels.py", "ops/*/kernels/*.py"),
    *("ops/common/dot.py", "ops/common/early.py", "ops/common/jit.py", "ops/common/sums.py"),
)
PACKAGES: dict[str, tuple[str, ...]] = {
    "torch": ANYWHERE,
    "safetensors": ("cache/file.py", "hf/adapter_files.py"),  # the latter names its errors
    "tokenizers": ("data/*",),
    "rich": ("recipes/*", "train/*", "cli/*", "adapters/*"),
    "tyro": ("cli/*",),
    "tomli_w": ("train/config_file.py",),
    "jinja2": ("chat/worker.py",),
    "matplotlib": ("recipes/*",),
    "plotly": ("pages/page.py",),
    "datasets": ("data/*",),
    "pyarrow": ("data/*",),
    "triton": ("ops/compat.py", *KERNELS),
    "wandb": ("train/metrics.py",),
    "torchao": ("train/eight_bit.py",),
    "transformer_engine": ("layers/linear.py",),
    "transformers": HF_ROOM,
    "peft": HF_ROOM,
    "lm_eval": ("evaluation/tasks.py", "evaluation/harness.py"),
    "accelerate": (),  # of the extra `hf`: used by tests and by those who call us
    "trl": (),
    "nemo_automodel": ("nemo/*",),
}
# Imported inside a function: an optional one, and one that only writing a page needs.
OPTIONAL = frozenset(
    {"plotly", "triton", "transformer_engine", "datasets", "pyarrow", "nemo_automodel"}
)


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
    if room == "cli" and target and not item.functions and not OPTIONS.fullmatch(".".join(rest)):
        return "the command line imports a room only where a verb runs, so that help is quick"
    return None


def op_problem(path: str, rest: list[str]) -> str | None:
    """Inside ops: a file sees its own op, the files that all ops share, and other ops' op.py. An
    op made of others, or a case of another, writes each form with the same form of theirs."""
    own, mine = [*path.removesuffix(".py").split("/"), ""][1:3]  # kernels/x.py is of kernels
    if len(rest) < 2:
        return "import another op from its op.py"
    other, form = rest[1], ".".join(rest[2:3])
    shared = other == "common" or (PACKAGE / "ops" / f"{other}.py").is_file()
    same_form = form in ("reference", "cases", "kernels") and mine == form
    same_form = same_form or (form.startswith("portable") and mine == "portable")
    if other == own or shared or form == "op" or same_form:
        return None
    if mine == "op" and form == "kernels":  # an op may be a case of another's kernels
        return None
    return f"only {other}/op.py may be imported by another op"


def third_party_problem(path: str, room: str, item: Import) -> str | None:
    package = item.target.split(".")[0]
    if package not in PACKAGES:
        return "not among the package's dependencies: declare it in pyproject.toml and here"
    if not matches(path, PACKAGES[package]):
        where = ", ".join(PACKAGES[package]) or "tests"
        return f"{package} may only be imported in {where}"
    if package in OPTIONAL and not item.functions and not matches(path, KERNELS):
        return f"{package} is optional: import it inside a function"
    if f"{item.target}.".startswith("torch.distributed.") and room in WITHOUT_DISTRIBUTED:
        return f"{room} knows one device: what is distributed comes from parallel"
    return None


FILES = sorted(p.relative_to(PACKAGE).as_posix() for p in PACKAGE.rglob("*.py"))


def source_of(path: str) -> str:
    return (PACKAGE / path).read_text(encoding="utf-8")


def test_every_room_of_the_table_is_there():
    assert {room_of(path) for path in FILES if "/" in path} == ROOMS
    assert set(MAY_IMPORT) == ROOMS | {"", "__main__"}


def test_every_place_of_a_package_is_one():
    """A pattern that a moved file left behind would allow an import where nobody expects it."""
    used = {
        (item.target.split(".")[0], path)
        for path in FILES
        for item in imports(path, source_of(path))
    }
    stale = [
        (package, pattern)
        for package, patterns in PACKAGES.items()
        for pattern in patterns
        if not any(name == package and fnmatch(path, pattern) for name, path in used)
    ]
    assert stale == []


@pytest.mark.parametrize("path", FILES)
def test_a_file_imports_only_what_its_room_may(path):
    assert broken_rules(path, source_of(path)) == []


@pytest.mark.parametrize(
    ("path", "source", "message"),
    [
        ("config.py", "from nemotron_v3.layout import L", "config may not import layout"),
        ("layout.py", "import nemotron_v3.config", "layout may not import config"),
        ("ops/ssd/op.py", "from nemotron_v3.config import X", "ops may not import config"),
        ("ops/ssd/op.py", "import nemotron_v3.ops.attention.portable", "only attention/op.py"),
        ("ops/ssd/op.py", "from ..attention.portable import f", "only attention/op.py"),
        ("ops/ssd/op.py", "import triton", "may only be imported in"),
        ("layers/linear.py", "import transformer_engine", "import it inside a function"),
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
        ("hf/trainer.py", "def f():\n  import trl", "may only be imported in tests"),
        ("data/x.py", "def f():\n  from nemotron_v3.model import M", "data may not import model"),
        ("train/loop.py", "import nemotron_v3.generation", "train may not import generation"),
        ("recipes/demo.py", "from nemotron_v3.hf import register", "recipes may not import hf"),
        ("recipes/demo.py", "import pandas", "not among the package's dependencies"),
        ("cli/main.py", "from nemotron_v3.recipes.demo import run", "only where a verb runs"),
        ("cli/demo.py", "from nemotron_v3.recipes.demo import run", "only where a verb runs"),
        ("hf/register.py", "import nemotron_v3.cli.main", "hf may not import cli"),
        ("nemo/enable.py", "import nemotron_v3.hf", "nemo may not import hf"),
        ("nemo/enable.py", "import nemo_automodel", "import it inside a function"),
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
        ("ops/ssd/op.py", "def f():\n  from nemotron_v3.ops.ssd import kernels"),
        ("ops/ssd/kernels.py", "import triton\nimport triton.language as tl"),
        ("ops/mamba2/reference.py", "from nemotron_v3.ops.ssd.reference import ssd"),
        (
            "ops/rms_norm/op.py",
            "def f():\n  from nemotron_v3.ops.gated_rms_norm.kernels import rms_norm",
        ),
        ("ops/mamba2/portable.py", "from nemotron_v3.ops.ssd.op import ssd"),
        ("ops/mamba2/portable.py", "from nemotron_v3.ops.ssd.portable_backward import backward"),
        ("model/model.py", "class M:\n  def generate(self):\n    import nemotron_v3.generation"),
        ("layers/linear.py", "def f():\n  import transformer_engine.pytorch as te"),
        ("hf/register.py", "import transformers\nfrom nemotron_v3.model import M"),
        ("cli/demo.py", "from nemotron_v3.recipes.options import Options"),
        ("cli/demo.py", "def run():\n  from nemotron_v3.recipes.demo import run"),
        ("__main__.py", "from nemotron_v3.cli.main import main"),
        ("cli/main.py", "def main():\n  from nemotron_v3.recipes.demo import run"),
        ("parallel/x.py", "import torch.distributed"),
    ],
)
def test_what_the_table_allows_is_allowed(path, source):
    assert broken_rules(path, source) == []


def loaded_by(script: str) -> set[str]:
    """The packages outside the standard library that `script` imports."""
    script = f"import sys; {script}; print(*{{name.partition('.')[0] for name in sys.modules}})"
    done = subprocess.run(
        [sys.executable, "-W", "error", "-c", script], capture_output=True, text=True, check=True
    )
    assert done.stderr == ""
    return set(done.stdout.split()) - set(sys.stdlib_module_names)


def test_no_modules_import_each_other():
    """In functions and for types neither: what two files share lies in a third."""
    assert cycles(PACKAGE) == []


def test_a_circle_is_found(tmp_path):
    package = tmp_path / "room"
    package.mkdir()
    (package / "__init__.py").write_text("")
    (package / "a.py").write_text("def f():\n    from room.b import g\n")
    (package / "b.py").write_text("from room import a\n")
    (package / "c.py").write_text("from room.a import f\n")
    assert cycles(package) == [["room.a", "room.b"]]


def test_importing_the_package_loads_no_other():
    assert loaded_by("import nemotron_v3") & {*PACKAGES, "numpy"} == set()


def test_the_public_names_load_nothing_but_torch_and_safetensors():
    names = "import safetensors.torch, torch; from nemotron_v3 import *"
    before = loaded_by("import safetensors.torch, torch")
    # torch brings in packages of its own as more of it is used; ours are the ones that matter.
    assert (loaded_by(names) - before) & {*PACKAGES, "numpy"} == set()


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
        "torch", "safetensors", "jinja2", "tokenizers", "rich", "tyro", "matplotlib", "plotly",
        "tomli-w",
    }  # fmt: skip
