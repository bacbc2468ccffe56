"""Eight processes against one: what a plan, a model and a pass may be, each with each once."""

from functools import partial

import pytest
import torch

from nemotron_v3.parallel import Plan
from tests.parallel.equality import MANY, Case, compare
from tests.parallel.processes import run

LATENT = MANY | {"moe_latent_size": 28}
# The third process has no token. Of eight processes two or four share rows of the same experts
# where ep is less, and each set of HSDP holds the whole model.
CASES = [
    Case(Plan(ep=8, dispatcher="gather"), checkpointing=True),
    Case(Plan(ep=8, dispatcher="all_to_all"), config=LATENT, lora=4),
    Case(Plan(ep=4, dispatcher="gather"), config=LATENT, lora=4, checkpointing=True),
    Case(Plan(ep=2, dispatcher="all_to_all"), checkpointing=True, pattern="EM"),
    Case(Plan(dp_replicate=2, ep=4, dispatcher="all_to_all"), config=MANY, pattern="EM"),
    Case(Plan(dp_replicate=2, ep=2, dispatcher="gather"), dtype=torch.float32, lora=4),
]


@pytest.mark.integration
def test_eight_processes_compute_what_one_does():
    run([partial(_compare, case) for case in CASES], 8)


def _compare(case: Case, rank: int) -> None:
    compare(case)
