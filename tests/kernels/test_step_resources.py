"""What every kernel of a decode step needs, on each kind of GPU that the package is used on."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

pytest.importorskip("triton")

# Bytes of shared memory that a program may have, and bytes that it may spill: the router's kernel
# keeps a cursor of its choices there.
SHARED = {80: 163 * 1024, 89: 99 * 1024, 90: 227 * 1024}
SPILLED = 32  # bytes a thread, of a single value around a loop
KERNELS = {
    *("linear_kernel", "step_kernel", "parts_kernel", "combine_kernel", "route_kernel"),
    *("up_kernel", "down_kernel", "thin_kernel"),
}


@pytest.mark.parametrize(
    ("architecture", "rows"),
    [
        pytest.param(89, (16,), id="sm_89-16"),
        *(
            pytest.param(a, (1, 8, 32, 64, 128), id=f"sm_{a}", marks=pytest.mark.heavy)
            for a in SHARED
        ),
    ],
)
def test_a_step_fits(architecture, rows):
    done = subprocess.run(
        [
            *(sys.executable, "-W", "ignore", "-m", "tests.kernels.compiled_step"),
            *(str(architecture), *map(str, rows)),
        ],
        cwd=Path(__file__).parents[2],
        capture_output=True,
        text=True,
        env={**os.environ, "TRITON_INTERPRET": "0"},
    )
    assert done.returncode == 0, done.stderr[-2000:]
    found = json.loads(done.stdout.splitlines()[-1])
    assert {needs["kernel"] for needs in found} >= KERNELS
    for needs in found:
        assert needs["shared"] <= SHARED[architecture], needs
        assert needs["spilled"] <= SPILLED, needs
