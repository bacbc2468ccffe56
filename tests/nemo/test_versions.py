"""What the room says where NeMo AutoModel is not installed, or is another version."""

import re
import subprocess
import sys
from importlib import metadata
from pathlib import Path

import pytest
import torch

from nemotron_v3 import nemo
from nemotron_v3.nemo import classes, versions


def test_importing_the_room_imports_neither_automodel_nor_transformers():
    script = (
        "import sys, nemotron_v3.nemo; "
        "print(*{'nemo_automodel', 'transformers', 'triton', 'peft'} & set(sys.modules))"
    )
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True)
    assert (done.stdout.strip(), done.stderr) == ("", "")


@pytest.mark.parametrize("found", ["0.4.0", "0.8.1", "1.7.0"])
def test_another_version_is_refused_with_the_one_to_install(monkeypatch, found):
    monkeypatch.setattr(versions, "version", lambda name: found)
    with pytest.raises(ImportError, match=rf"{re.escape(found)} is installed.*automodel==0\.7\.0"):
        nemo.accelerate(torch.nn.Linear(2, 2))
    with pytest.raises(ImportError, match="is installed"):
        nemo.enable()


def test_none_is_refused_and_says_where_to_install_it(monkeypatch):
    def none(name):
        raise metadata.PackageNotFoundError(name)

    monkeypatch.setattr(versions, "version", none)
    with pytest.raises(ImportError, match="not installed.*an environment of its own"):
        nemo.enable()


@pytest.mark.parametrize("found", ["0.5.0", "0.6.1", "0.7.0", "0.7.3", "0.7.0rc1"])
def test_patch_releases_are_taken(monkeypatch, found):
    monkeypatch.setattr(versions, "version", lambda name: found)
    versions.check_version()


def test_a_model_of_another_kind_is_refused(monkeypatch):
    monkeypatch.setattr(versions, "version", lambda name: "0.7.0")
    with pytest.raises(TypeError, match=r"Nemotron-H in a torch\.nn.*Linear.*nemotron_v3\.hf"):
        nemo.accelerate(torch.nn.Linear(2, 2))
    with pytest.raises(TypeError, match="a builtins.str is no model"):
        nemo.accelerate("nvidia/model")
    with pytest.raises(ValueError, match="'fast' is not offered: one of 'auto'"):
        nemo.accelerate(torch.nn.Linear(2, 2), impl="fast")
    with pytest.raises(ValueError, match="nothing to undo"):
        nemo.undo(torch.nn.Linear(2, 2))


def test_the_extra_takes_the_stated_versions():
    text = (Path(__file__).parents[2] / "pyproject.toml").read_text(encoding="utf-8")
    major, minor = map(int, versions.NEWEST.split("."))
    line = f'"nemo-automodel>={versions.OLDEST},<{major}.{minor + 1}"'
    assert line in text


def test_every_version_has_an_environment_and_a_line_of_the_page():
    root = Path(__file__).parents[2]
    made = (root / "Makefile").read_text(encoding="utf-8")
    page = (root / "docs" / "nemo.md").read_text(encoding="utf-8")
    found = re.findall(r"^AUTOMODEL_(0\.\d+)\.0 := transformers==([\d.]+)", made, re.MULTILINE)
    assert found[0] == (versions.NEWEST, versions.ITS_TRANSFORMERS)
    assert found[-1][0] == versions.OLDEST
    for minor, transformers in found:
        assert f"| {minor}.0 | {transformers} |" in page


def test_the_table_names_every_class_once():
    import nemotron_v3.nemo.accelerate  # noqa: F401

    names = {name.rsplit(".", 1)[-1] for name in classes.FORWARDS}
    assert names == {
        "NemotronHForCausalLM", "NemotronV3Model", "NemotronV3Block", "NemotronV3Attention",
        "NemotronV3Mamba2Mixer", "NemotronV3MambaRMSNormGated", "MLP", "Gate", "GroupedExperts",
    }  # fmt: skip
