"""What every test starts from: a seed, one thread a worker, and where kernels run."""

import os
import signal

import pytest
import torch
from hypothesis import settings


def pytest_configure() -> None:
    # A busy machine is no fault of what is tested.
    settings.register_profile("untimed", deadline=None)
    settings.load_profile("untimed")
    # Each xdist worker has one core; two workers of two threads each would take turns.
    if "PYTEST_XDIST_WORKER" in os.environ:
        torch.set_num_threads(1)
    # What a shell starts in the background has interrupts ignored, and its children inherit it.
    if signal.getsignal(signal.SIGINT) is signal.SIG_IGN:
        signal.signal(signal.SIGINT, signal.default_int_handler)
    # Without a GPU, kernels run in Triton's interpreter: chosen before anything imports Triton.
    if not torch.cuda.is_available():
        os.environ.setdefault("TRITON_INTERPRET", "1")


@pytest.fixture(autouse=True)
def _seed() -> None:
    torch.manual_seed(0)
