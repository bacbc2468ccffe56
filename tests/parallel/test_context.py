"""Tokens of a batch shared by several processes, against one process."""

import pytest

from tests.parallel.processes import run
from tests.parallel.shared_and_spread import spread
from tests.parallel.shared_tokens import (
    disagreeing,
    documented,
    isolated,
    mixers,
    models,
    planned,
    sending,
)


@pytest.mark.integration
@pytest.mark.parametrize(
    ("size", "workers"),
    [
        (2, (mixers, sending, documented)),
        (4, (mixers, models, isolated, disagreeing, planned, spread)),
    ],
    ids=["two", "four"],
)
def test_shares_compute_what_the_whole_does(size, workers):
    run(workers, size)
