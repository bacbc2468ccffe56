"""What the kernels of decoding need of a Hopper multiprocessor, held; older GPUs compile them."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from tests.kernels.test_resources import REGISTERS_OF_MULTIPROCESSOR, SHARED_OF_MULTIPROCESSOR

pytestmark = pytest.mark.heavy  # every kernel is compiled, which takes a minute of a processor


pytest.importorskip("triton")

# programs on a multiprocessor at least, bytes spilled at most; loads are of 16 bytes. Triton 3.6
# takes up to a third more registers than 3.9.
HELD = {
    "attention, parts": (3, 0),
    "attention, combined": (8, 0),
    "mamba2, one slot": (8, 0),
    "mamba2, many slots": (2, 0),
    "sampling, largest": (1, 0),
    "sampling, scaled": (1, 0),
    "sampling, searched": (1, 8),
    "sampling, finished": (1, 0),
}


@pytest.fixture(scope="module")
def found() -> dict[str, dict[str, int]]:
    environment = {**os.environ, "TRITON_INTERPRET": "0"}
    done = subprocess.run(
        [sys.executable, "-W", "ignore", "-m", "tests.kernels.compiled_decode"],
        cwd=Path(__file__).parents[2],
        capture_output=True,
        text=True,
        env=environment,
    )
    assert done.returncode == 0, done.stderr[-2000:]
    return json.loads(done.stdout.splitlines()[-1])


@pytest.mark.parametrize("kernel", HELD)
def test_resources(found, kernel):
    needs, (programs, spilled) = found[kernel], HELD[kernel]
    by_registers = REGISTERS_OF_MULTIPROCESSOR // (needs["registers"] * needs["warps"] * 32)
    by_shared = SHARED_OF_MULTIPROCESSOR // max(needs["shared"] + 1024, 1)
    assert min(by_registers, by_shared) >= programs, needs
    assert needs["spilled"] <= spilled, needs
    assert needs["wide_loads"] > 0, needs
