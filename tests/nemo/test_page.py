"""The code of docs/nemo.md, in the environment that it is for."""

import re
from pathlib import Path

import yaml
from nemo_automodel.components.models.common import BackendConfig

from nemotron_v3 import nemo
from tests.nemo.models import their_model

PAGE = (Path(__file__).parents[2] / "docs" / "nemo.md").read_text(encoding="utf-8")


def block(language: str) -> str:
    (found,) = re.findall(rf"^```{language}\n(.*?)^```", PAGE, re.MULTILINE | re.DOTALL)
    return found


def test_the_python_block_runs():
    model = their_model()
    exec(compile(block("py"), "docs/nemo.md", "exec"), {"model": model})
    assert not nemo.is_accelerated(model) and not nemo.is_accelerated(their_model())


def test_the_line_of_the_recipe_is_what_automodel_makes_a_backend_of(monkeypatch):
    from nemo_automodel.components.config.loader import ConfigNode

    node = ConfigNode(yaml.safe_load(block("yaml"))["model"]["backend"])
    try:
        assert type(node.instantiate()) is BackendConfig
        assert nemo.is_accelerated(their_model())
    finally:
        nemo.disable()
