"""What every test starts from: a seed, and one thread a worker."""

import os

import pytest
import torch


def pytest_configure() -> None:
    # Each xdist worker has one core; two workers of two threads each would take turns.
    if "PYTEST_XDIST_WORKER" in os.environ:
        torch.set_num_threads(1)


@pytest.fixture(autouse=True)
def _seed() -> None:
    torch.manual_seed(0)
