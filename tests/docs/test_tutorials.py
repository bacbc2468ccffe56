"""The four roads: each tutorial from its first block to its last, commands included."""

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
TUTORIALS = sorted((ROOT / "docs" / "tutorials").glob("*.md"))
BLOCK = re.compile(r"^```(python|bash)\n(.*?)^```", re.MULTILINE | re.DOTALL)


def test_the_front_page_leads_to_every_tutorial():
    page = (ROOT / "docs" / "index.md").read_text("utf-8")
    assert len(TUTORIALS) == 4
    assert all(f"(tutorials/{path.name})" in page for path in TUTORIALS)


@pytest.mark.integration
@pytest.mark.parametrize("page", TUTORIALS, ids=lambda page: page.stem)
def test_a_tutorial_runs_to_its_end(page, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    command = tmp_path / "bin" / "nemotron-v3"
    command.parent.mkdir()
    command.write_text(f'#!/bin/sh\nexec {sys.executable} -m nemotron_v3 "$@"\n')
    command.chmod(0o755)
    paths = {"PATH": f"{command.parent}:{os.environ['PATH']}", "PYTHONPATH": str(ROOT / "src")}
    namespace: dict[str, object] = {"__name__": page.stem}
    blocks = BLOCK.findall(page.read_text("utf-8"))
    assert blocks
    for number, (language, body) in enumerate(blocks):
        if language == "python":
            exec(compile(body, f"{page.name}, block {number}", "exec"), namespace)
            continue
        done = subprocess.run(
            ["bash", "-euo", "pipefail", "-c", body], capture_output=True, text=True,
            env=os.environ | paths,
        )  # fmt: skip
        assert done.returncode == 0, done.stderr
        assert done.stdout
