"""The package's own names: as if they were imported, and imported when somebody asks."""

import importlib
import subprocess
import sys

import pytest

import nemotron_v3

ROOMS = ("cache", "checkpoint", "config", "layers", "layout", "model", "ops")


@pytest.mark.parametrize("name", nemotron_v3.__all__)
def test_a_public_name_is_that_of_its_room(name):
    value = getattr(nemotron_v3, name)
    assert value is getattr(importlib.import_module(value.__module__), name)
    # Found without __getattr__ from then on.
    assert vars(nemotron_v3)[name] is value


@pytest.mark.parametrize("room", ROOMS)
def test_a_room_is_an_attribute(room):
    assert getattr(nemotron_v3, room) is importlib.import_module(f"nemotron_v3.{room}")


def test_dir_lists_what_is_there_before_it_is_imported():
    script = "import sys, nemotron_v3; print(*dir(nemotron_v3)); assert 'torch' not in sys.modules"
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert {*nemotron_v3.__all__, *ROOMS, "__version__"} <= set(done.stdout.split())


def test_a_star_gives_the_public_names():
    namespace: dict[str, object] = {}
    exec("from nemotron_v3 import *", namespace)
    assert set(nemotron_v3.__all__) == set(namespace) - {"__builtins__"}


def test_an_unknown_name_is_an_attribute_error():
    with pytest.raises(AttributeError, match="module 'nemotron_v3' has no attribute 'Nemotron'"):
        nemotron_v3.Nemotron  # noqa: B018
    with pytest.raises(ImportError, match="cannot import name 'Nemotron'"):
        exec("from nemotron_v3 import Nemotron")


def test_a_type_checker_sees_the_names_that_are_there():
    import ast
    from pathlib import Path

    tree = ast.parse(Path(nemotron_v3.__file__).read_text())
    (checking,) = (node for node in tree.body if isinstance(node, ast.If))
    seen = {
        (alias.name, node.module) for node in checking.body for alias in node.names
    }  # fmt: skip
    for name, module in seen:
        value = getattr(importlib.import_module(module), name)
        assert getattr(nemotron_v3, name) is value
    assert {name for name, _ in seen} == {*nemotron_v3.__all__, *ROOMS}
