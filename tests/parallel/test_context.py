"""Tokens of a batch shared by several processes, against one process."""

import pytest

from tests.parallel.processes import run
from tests.parallel.shared_and_spread import spread
from tests.parallel.shared_prompts import generated, prompts, unfit
from tests.parallel.shared_tokens import (
    disagreeing,
    documented,
    isolated,
    mixers,
    models,
    planned,
    sending,
)

OF_TWO = (mixers, sending, documented, prompts, generated, unfit)
OF_FOUR = (mixers, models, isolated, disagreeing, planned, spread, prompts)


@pytest.mark.integration
@pytest.mark.parametrize(("size", "workers"), [(2, OF_TWO), (4, OF_FOUR)], ids=["two", "four"])
def test_shares_compute_what_the_whole_does(size, workers):
    """Outputs, losses and gradients, what is sent, what is refused, and caches of prompts."""
    run(workers, size)
