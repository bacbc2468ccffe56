"""The range of transformers this room works with."""

import re
import subprocess
import sys
from pathlib import Path

import pytest
import transformers

from nemotron_v3.hf import NEWEST, OLDEST, accelerate, check_version, register, versions
from tests.hf.models import transformers_model

ROOT = Path(__file__).parents[2]


@pytest.mark.parametrize("version", ["5.17.0", "5.17.3", "5.20.2", "5.24.0", "5.24.9"])
def test_inside(version, monkeypatch):
    monkeypatch.setattr(transformers, "__version__", version)
    check_version()


@pytest.mark.parametrize("version", ["5.16.1", "5.25.0", "5.25.0.dev0", "4.57.6", "6.0.0"])
def test_outside_is_an_error_and_the_model_untouched(version, monkeypatch):
    model = transformers_model()
    classes = [type(module) for module in model.modules()]
    monkeypatch.setattr(transformers, "__version__", version)
    message = re.escape(f"transformers {version} is installed; nemotron_v3.hf is tested with")
    for call in (check_version, register, lambda: accelerate(model)):
        with pytest.raises(ImportError, match=message):
            call()
    assert [type(module) for module in model.modules()] == classes


def test_the_import_says_so_too():
    script = "import transformers; transformers.__version__ = '5.16.0'; import nemotron_v3.hf"
    done = subprocess.run(
        [sys.executable, "-c", script], capture_output=True, text=True, check=False
    )
    assert done.returncode and f"with {OLDEST} to {NEWEST}" in done.stderr


def test_the_range_stands_in_one_place():
    """What pip is asked for, and what the oldest environment installs, follow `versions`."""
    project = (ROOT / "pyproject.toml").read_text(encoding="utf-8")
    upper = versions._next_minor(NEWEST)
    assert f'"transformers>={OLDEST},<{upper}"' in project
    makefile = (ROOT / "Makefile").read_text(encoding="utf-8")
    assert re.search(rf"^OLDEST_TRANSFORMERS := {re.escape(OLDEST)}\.", makefile, re.MULTILINE)
