"""The private names of PyTorch and Triton do what the ops use them for, and stand in one file."""

import re
from pathlib import Path

import pytest
import torch
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.autograd import forward_ad

from nemotron_v3 import ops
from nemotron_v3.ops import compat

PRIVATE = re.compile(
    r"torch\._|\._C\b|torch\.[a-z.]*\._[a-z]|\.mkldnn\._|_current_level|triton\.knobs|triton\.runtime"
)
ROOM = Path(ops.__file__).parent


def test_ops_use_private_names_in_one_file_alone():
    for path in ROOM.rglob("*.py"):
        if path != ROOM / "compat.py":
            # Registered ops are read back from torch.ops, whose names are the library's own.
            found = PRIVATE.findall(path.read_text(encoding="utf-8"))
            assert found == [], path.relative_to(ROOM)


def test_transforms_are_seen():
    seen = []

    def look(x):
        seen.append((compat.current_transform() is not None, compat.in_derivative_or_batch()))
        return x.sum()

    look(torch.ones(2))
    torch.func.grad(look)(torch.ones(2))
    torch.func.vmap(look)(torch.ones(2, 2))
    torch.func.functionalize(look)(torch.ones(2))
    assert seen == [(False, False), (True, True), (True, True), (True, False)]


def test_modes_are_seen():
    assert not compat.dispatch_modes() and not compat.in_forward_mode()
    with FakeTensorMode():
        assert compat.dispatch_modes()
    with forward_ad.dual_level():
        assert compat.in_forward_mode()


@pytest.mark.parametrize("kept", [False, True])
def test_a_graph_that_is_kept_says_so(kept):
    seen = []
    x = torch.ones(2, requires_grad=True)
    y = x * 2
    y.register_hook(lambda _: seen.append(compat.graph_is_kept()))
    y.sum().backward(retain_graph=kept)
    assert seen == [kept]


def test_hooks_on_triton_launches_are_seen(monkeypatch):
    runtime = pytest.importorskip("triton").knobs.runtime
    assert not compat.launch_is_hooked()
    monkeypatch.setattr(runtime.launch_exit_hook, "calls", [print])
    assert compat.launch_is_hooked()
