"""Threads of a CPU, settled for a script of one's own."""

import os
import subprocess
import sys

import pytest

from nemotron_v3 import settle_threads
from nemotron_v3.config.threads import SPIN

CLEAN = {n: v for n, v in os.environ.items() if not n.startswith(("OMP_", "GOMP_"))}


def run(script: str) -> str:
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, env=CLEAN)
    assert done.returncode == 0, done.stderr
    return done.stdout.strip()


def test_before_torch_it_bounds_spinning_and_loads_nothing():
    script = (
        "import os, sys, nemotron_v3; nemotron_v3.settle_threads(1); "
        "assert 'torch' not in sys.modules; import torch; "
        "print(os.environ['GOMP_SPINCOUNT'], torch.get_num_threads())"
    )
    assert run(script) == f"{SPIN} 1"


def test_behind_torch_it_is_refused_with_the_way_out(monkeypatch):
    monkeypatch.setattr(os, "environ", {})
    with pytest.raises(RuntimeError, match=f"before `import torch`, or .*GOMP_SPINCOUNT={SPIN}"):
        settle_threads()
    assert os.environ == {}
    with pytest.raises(ValueError, match="threads is 0"):
        settle_threads(0)
