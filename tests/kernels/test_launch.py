"""What launches kernels, apart from a GPU."""

import ast
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from triton.compiler import CompiledKernel
from triton.knobs import runtime
from triton.runtime import driver

from nemotron_v3 import ops
from nemotron_v3.ops import compat
from nemotron_v3.ops.common import launch


@pytest.fixture
def launched(monkeypatch):
    """`(launcher, calls)`: of a launcher whose kernel is compiled, and what its `run` was given."""
    calls = []
    compiled = object.__new__(CompiledKernel)
    compiled.module = "loaded"  # so that nothing is
    compiled._module_pid = None
    compiled.function, compiled.packed_metadata = "function", "packed"
    compiled.name, compiled.src = "kernel", None
    compiled._run = lambda *args: calls.append(args)

    class Kernel:
        params = [SimpleNamespace(do_not_specialize=False)] * 5

        def __getitem__(self, grid):
            return lambda *args, **options: compiled

    class Active:
        get_current_device = staticmethod(lambda: None)
        get_current_stream = staticmethod(lambda device: "stream")

    monkeypatch.setattr(driver, "_active", Active(), raising=False)
    monkeypatch.setattr(type(driver), "active", Active(), raising=False)
    monkeypatch.setattr(launch, "interpreted", lambda: False)
    monkeypatch.setattr(compat, "current_raw_stream", lambda device: "stream")
    yield launch.Launcher(Kernel()), compiled, calls
    compiled.module = None


def test_a_known_kernel_is_run_as_triton_runs_it(launched):
    launcher, compiled, calls = launched
    x = torch.zeros(4)
    for _ in range(2):
        launcher(3, (x, None), (7,), (16, True))
    (ours,) = calls
    compiled[(3, 1, 1)](x.data_ptr(), None, 7, 16, True)
    theirs = calls.pop()
    # The three in the middle are metadata and hooks, which nobody has asked for.
    assert ours[6:9] == (None, None, None)
    assert ours[:6] == theirs[:6] == (3, 1, 1, "stream", "function", "packed")
    assert ours[9:] == theirs[9:]


def test_a_hook_of_triton_sees_every_launch(launched, monkeypatch):
    launcher, _, calls = launched
    seen = []
    hook = runtime.launch_enter_hook
    monkeypatch.setattr(hook, "calls", [seen.append])
    x = torch.zeros(4)
    for _ in range(2):
        launcher(3, (x, None), (7,), (16, True))
    (given,) = calls
    assert given[7] is hook


def test_a_kernel_is_found_by_the_type_of_what_comes_with_the_data(launched):
    """Whether a number is a multiple of 16, or 1, matters for a width and not for a length."""
    launcher, _, calls = launched
    launcher.by_value = [True, False, True]  # of x, a length and a width
    x = torch.zeros(4)
    for length in (7, 16, 1, 32):
        launcher(3, (x,), (length, 16), (True,))
    assert len(launcher.compiled) == 1 and len(calls) == 3
    launcher(3, (x,), (7, 15), (True,))
    assert len(launcher.compiled) == 2


def test_every_kernel_pins_the_sizes_of_the_data():
    """Kernels are made by `ops.common.jit.kernel`, which knows the names of what differs from step
    to step: no launched kernel is made by triton.jit itself."""
    made = {"kernel": 0}
    for path in Path(ops.__file__).parent.rglob("*.py"):
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            if isinstance(node, ast.FunctionDef) and node.name.endswith("_kernel"):
                assert [ast.unparse(d) for d in node.decorator_list] == ["kernel"], (
                    path,
                    node.name,
                )
                made["kernel"] += 1
    assert made["kernel"] > 25
