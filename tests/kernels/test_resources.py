"""What the kernels need of a Hopper multiprocessor, held: registers, shared memory, wide loads."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

pytestmark = pytest.mark.heavy  # every kernel is compiled, which takes a minute of a processor


pytest.importorskip("triton")

SHARED_OF_MULTIPROCESSOR = 227 * 1024
REGISTERS_OF_MULTIPROCESSOR = 65536

# warps, programs on a multiprocessor at least, bytes spilled at most, loads of 16 bytes, products
# on tensor cores. Triton 3.6 spills nothing of the scan and 40 bytes of the gradients, 3.9 more.
HELD = {
    "attention forward": (4, 2, 0, True, True),
    "attention dq": (4, 2, 0, True, True),
    "attention dkv": (4, 1, 416, True, True),
    "conv forward": (4, 4, 0, True, False),
    "conv backward": (1, 20, 0, False, False),
    "norm forward": (2, 16, 0, True, False),
    "norm backward": (2, 6, 0, True, False),
    "state passing": (8, 1, 0, True, True),
    "chunk scan": (4, 2, 80, True, True),
    "dcb": (4, 2, 0, True, True),
    "dA boundary": (8, 1, 0, True, True),
    "chunk scan backward": (4, 2, 96, True, True),
}


@pytest.fixture(scope="module")
def found() -> dict[str, dict[str, int]]:
    environment = {**os.environ, "TRITON_INTERPRET": "0"}
    script = Path(__file__).with_name("compiled.py")
    done = subprocess.run(
        [sys.executable, "-W", "ignore", script], capture_output=True, text=True, env=environment
    )
    assert done.returncode == 0, done.stderr[-2000:]
    return json.loads(done.stdout.splitlines()[-1])


@pytest.mark.parametrize("kernel", HELD)
def test_resources(found, kernel):
    warps, programs, spilled, wide_loads, tensor_cores = HELD[kernel]
    needs = found[kernel]
    by_registers = REGISTERS_OF_MULTIPROCESSOR // (needs["registers"] * warps * 32)
    by_shared = SHARED_OF_MULTIPROCESSOR // max(needs["shared"] + 1024, 1)
    assert min(by_registers, by_shared) >= programs, needs
    assert needs["spilled"] <= spilled, needs
    assert not wide_loads or needs["wide_loads"] > 0, needs
    assert not tensor_cores or needs["tensor_cores"] > 0, needs
