"""The table of many GPUs, in processes of a CPU: that every row is measured, and on fewer again."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]


def table(processes: int, folder: Path, *sections: str) -> list[str]:
    """What a run prints on its standard output, by lines."""
    command = [sys.executable, "-m", "torch.distributed.run", f"--nproc_per_node={processes}"]
    command += ["-m", "benchmarks.many_gpus", "--tiny", *sections]
    command += ["--results", f"{folder / 'results.json'}", "--folder", f"{folder / 'saved'}"]
    told = {"OMP_NUM_THREADS": "1", "GLOO_SOCKET_IFNAME": "lo", "PYTHONPATH": f"{ROOT / 'src'}"}
    found = subprocess.run(
        command, cwd=ROOT, env=os.environ | told, capture_output=True, text=True, timeout=280
    )
    assert found.returncode == 0, found.stderr[-4000:]
    assert "FAILED" not in found.stdout, found.stdout
    return found.stdout.splitlines()


@pytest.mark.integration
def test_eight_processes_and_then_two(tmp_path):
    lines = table(8, tmp_path, "plans", "document", "checkpoint")
    for work in (
        "EP8, one pass a step",
        "EP4 x FSDP2, exposed communication",
        "EP2 x FSDP4, one pass a step",
        "one document",
        "mixers' communication",
        "written",
    ):
        assert any(line.startswith(work) for line in lines), lines
    lines = table(2, tmp_path, "slice", "checkpoint")
    assert any(line.startswith("read, saved by-8") for line in lines), lines
    assert json.loads((tmp_path / "results.json").read_text())["MEMEM*E with AdamW"].keys() == {"2"}
