"""Each example runs as a reader runs it, from another directory, without a network."""

import json
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from nemotron_v3 import from_pretrained

ROOT = Path(__file__).parents[2]
EXAMPLES = ROOT / "examples"


def run(directory: Path, *command: str) -> str:
    environment = os.environ | {
        "HF_HUB_OFFLINE": "1",
        "MPLBACKEND": "Agg",
        "COLUMNS": "120",
        "OMP_NUM_THREADS": "1",
        "PYTHONPATH": str(ROOT / "src"),
    }
    done = subprocess.run(
        [sys.executable, *command], cwd=directory, env=environment, capture_output=True, text=True
    )
    assert done.returncode == 0, done.stderr[-3000:]
    return done.stdout


def test_layers_in_your_model_learns_to_recall(tmp_path):
    told = run(tmp_path, str(EXAMPLES / "layers_in_your_model.py"))
    right = [int(number) for number in re.findall(r"right (\d+)%", told)]
    assert right[0] < 30 and right[-1] > 95, told


@pytest.mark.integration
def test_accelerate_transformers_computes_the_same(tmp_path):
    pytest.importorskip("transformers")
    told = run(
        tmp_path, str(EXAMPLES / "accelerate_transformers.py"), "--tokens", "100", "--steps", "1"
    )
    assert float(re.search(r"largest difference of a logit: (\S+)", told)[1]) < 2e-5
    assert "greedy tokens equal: True" in told
    before, after = map(float, re.findall(r"(\d+\.\d+) s (?:before|after)", told))
    assert before > 0 and after > 0


@pytest.mark.integration
@pytest.mark.filterwarnings("ignore")
def test_finetune_trl_lora_learns_saves_and_merges(tmp_path):
    pytest.importorskip("peft")
    pytest.importorskip("trl")
    script = str(EXAMPLES / "finetune_trl_lora.py")
    told = run(tmp_path, script, "--out", "out", "--steps", "30")
    found = [float(number) for number in re.findall(r"'loss': '?(\d+\.\d+)", told)]
    assert len(found) == 3 and found[-1] < 0.75 * found[0], told
    assert "6 of 6 blocks" in told and "merged 18 tensors into out/merged" in told
    base, merged = (from_pretrained(tmp_path / "out" / name) for name in ("base", "merged"))
    after = dict(merged.named_parameters())
    changed = {
        name.rpartition(".")[0].rpartition(".")[2]
        for name, tensor in base.named_parameters()
        if not torch.equal(tensor, after[name])
    }
    attention = {"q_proj", "k_proj", "v_proj", "o_proj"}
    rest = {"in_proj", "out_proj", "up_proj", "down_proj", "fc1_latent_proj", "fc2_latent_proj"}
    assert changed == attention | rest


def notebook(path: Path) -> tuple[list[str], list[str]]:
    """Code to run, and the lines that are IPython's."""
    cells = json.loads(path.read_text())["cells"]
    code = ["".join(cell["source"]) for cell in cells if cell["cell_type"] == "code"]
    magic = [line for cell in code for line in cell.splitlines() if line.startswith("%")]
    return [cell for cell in code if "%" not in {line[:1] for line in cell.splitlines()}], magic


@pytest.mark.integration
def test_the_quickstart_notebook_runs_from_the_first_cell_to_the_plot(tmp_path):
    code, magic = notebook(EXAMPLES / "quickstart.ipynb")
    assert len(magic) == 1 and magic[0].startswith("%pip install")
    end = "print(json.dumps([losses, [len(axis.lines) for axis in figure.axes]]))"
    script = "\n".join([*code, "import json", "figure.savefig('plot.png')", end])
    (tmp_path / "quickstart.py").write_text(script)
    told = run(tmp_path, "quickstart.py")
    losses, lines = json.loads(told.splitlines()[-1])
    assert losses[-1] < 0.5 * losses[0]
    assert lines == [1, 3] and (tmp_path / "plot.png").stat().st_size > 10_000
    assert float(re.search(r"differ by (\S+)", told)[1]) < 1e-5


def test_the_notebook_is_stored_without_outputs():
    cells = json.loads((EXAMPLES / "quickstart.ipynb").read_text())["cells"]
    assert cells[0]["cell_type"] == "markdown"
    assert all(cell.get("outputs", []) == [] for cell in cells)


def test_every_example_is_tested():
    source = Path(__file__).read_text()
    found = [p for p in EXAMPLES.rglob("*") if p.suffix in (".py", ".ipynb")]
    assert len(found) >= 5
    for path in found:
        if path.name != "tiny.py":
            assert path.name in source, path.name
