"""What the kernels of linear cross entropy need of a Hopper multiprocessor, held."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from tests.kernels.test_resources import REGISTERS_OF_MULTIPROCESSOR

pytestmark = pytest.mark.heavy  # every kernel is compiled, which takes a minute of a processor


pytest.importorskip("triton")


def test_a_program_fits_without_spilling_and_loads_16_bytes_at_once():
    environment = {**os.environ, "TRITON_INTERPRET": "0"}
    done = subprocess.run(
        [sys.executable, "-W", "ignore", "-m", "tests.kernels.compiled_loss"],
        cwd=Path(__file__).parents[2],
        capture_output=True,
        text=True,
        env=environment,
    )
    assert done.returncode == 0, done.stderr[-2000:]
    found = json.loads(done.stdout.splitlines()[-1])
    assert len(found) == 4
    for name, needs in found.items():
        assert needs["registers"] * needs["warps"] * 32 <= REGISTERS_OF_MULTIPROCESSOR, (
            name,
            needs,
        )
        assert needs["spilled"] == 0 and needs["wide_loads"] > 0, (name, needs)
