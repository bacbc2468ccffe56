"""Threads of a CPU are settled in the environment, which torch reads when it is loaded."""

import os

import pytest

from nemotron_v3.cli.threads import settle_threads
from nemotron_v3.config.threads import SPIN

NAMES = ("OMP_NUM_THREADS", "OMP_WAIT_POLICY", "GOMP_SPINCOUNT")


@pytest.fixture(autouse=True)
def _environment(monkeypatch):
    monkeypatch.setattr(os, "environ", {k: v for k, v in os.environ.items() if k not in NAMES})
    monkeypatch.setattr("sys.modules", {})  # as before torch is loaded


@pytest.mark.parametrize(
    ("before", "threads", "after"),
    [
        ({}, None, {"GOMP_SPINCOUNT": str(SPIN)}),
        ({}, 3, {"GOMP_SPINCOUNT": str(SPIN), "OMP_NUM_THREADS": "3"}),
        ({"OMP_WAIT_POLICY": "active"}, None, {"OMP_WAIT_POLICY": "active"}),
        ({"GOMP_SPINCOUNT": "7", "OMP_NUM_THREADS": "2"}, None,
         {"GOMP_SPINCOUNT": "7", "OMP_NUM_THREADS": "2"}),
    ],
)  # fmt: skip
def test_what_the_environment_says_stays_and_spinning_is_bounded(before, threads, after):
    os.environ |= before
    settle_threads(threads)
    assert {name: os.environ[name] for name in NAMES if name in os.environ} == after
