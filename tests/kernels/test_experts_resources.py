"""What the kernels of the mixture of experts need of a Hopper multiprocessor, held."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from tests.kernels.test_resources import REGISTERS_OF_MULTIPROCESSOR, SHARED_OF_MULTIPROCESSOR

pytestmark = pytest.mark.heavy  # every kernel is compiled, which takes a minute of a processor


pytest.importorskip("triton")

# warps, programs on a multiprocessor at least, loads of 16 bytes, products on tensor cores; nothing
# may be spilled.
HELD = {
    "up": (8, 1, True, True),
    "down": (8, 1, True, True),
    "down backward": (8, 1, True, True),
    "up backward": (8, 1, True, True),
    "gradient of up": (4, 2, True, True),
    "gradient of down": (4, 2, True, True),
    "thin": (4, 3, True, True),
    "updated up": (8, 1, True, True),
    "updated down": (8, 1, True, True),
    "updated down backward": (8, 1, True, True),
    "gradient of A": (4, 3, True, True),
    "gradient of B": (4, 4, True, True),
    "gradient of A of down": (4, 3, True, True),
    "combine": (4, 8, True, False),
    "logits": (4, 1, True, True),
    "choose 6 of 128": (4, 4, True, False),
    "choose 22 of 512": (4, 3, True, False),
}


@pytest.fixture(scope="module")
def found() -> dict[str, dict[str, int]]:
    environment = {**os.environ, "TRITON_INTERPRET": "0"}
    done = subprocess.run(
        [sys.executable, "-W", "ignore", "-m", "tests.kernels.compiled_moe"],
        cwd=Path(__file__).parents[2],
        capture_output=True,
        text=True,
        env=environment,
    )
    assert done.returncode == 0, done.stderr[-2000:]
    return json.loads(done.stdout.splitlines()[-1])


@pytest.mark.parametrize("kernel", HELD)
def test_resources(found, kernel):
    warps, programs, wide_loads, tensor_cores = HELD[kernel]
    needs = found[kernel]
    by_registers = REGISTERS_OF_MULTIPROCESSOR // (needs["registers"] * warps * 32)
    by_shared = SHARED_OF_MULTIPROCESSOR // max(needs["shared"] + 1024, 1)
    assert min(by_registers, by_shared) >= programs, needs
    assert needs["spilled"] == 0, needs
    assert not wide_loads or needs["wide_loads"] > 0, needs
    assert not tensor_cores or needs["tensor_cores"] > 0, needs
