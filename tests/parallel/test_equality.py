"""Plans of several processes against one process."""

from functools import partial

import pytest
import torch

from nemotron_v3.parallel import Plan
from tests.parallel.equality import MANY, Case, compare
from tests.parallel.processes import run

pytestmark = pytest.mark.integration

OF_TWO = [
    Case(Plan(ep=2)),
    Case(Plan(ep=2), dtype=torch.float32, checkpointing=True, config=MANY),
    Case(Plan(dp_replicate=2), lora=4),
    Case(Plan(ep=2, dispatcher="all_to_all"), lora=4, checkpointing=True),
    Case(Plan(cp=2, cp_layout="contiguous"), pattern="ME*-M"),
    Case(Plan(cp=2, ep=2, cp_layout="zigzag"), pattern="ME*-M", checkpointing=True),
]
OF_FOUR = [
    Case(Plan(ep=4)),
    Case(Plan(ep=2), config=MANY | {"moe_latent_size": 28}, checkpointing=True),
    Case(Plan(dp_replicate=2, ep=2), lora=4, checkpointing=True),
    Case(Plan(ep=2), lora=4, config=MANY),
    Case(Plan(ep=4, dispatcher="all_to_all"), config=MANY | {"moe_latent_size": 28}),
    Case(Plan(ep=2, dispatcher="all_to_all"), dtype=torch.float32, checkpointing=True),
    Case(Plan(dp_replicate=2, dp_shard=2), dtype=torch.float32),
    Case(Plan(ep=4), dtype=torch.float32, lora=4, config=MANY | {"moe_latent_size": 28}),
    Case(Plan(cp=2, ep=2, dp_replicate=2, cp_layout="zigzag"), pattern="ME*-M", lora=4),
    Case(Plan(cp=2, ep=4, cp_layout="zigzag"), dtype=torch.float32, pattern="ME*-M"),
    Case(Plan(cp=4, cp_layout="contiguous"), pattern="ME*-M", checkpointing=True),
]
OF_EIGHT = [
    Case(Plan(cp=4, ep=4, cp_layout="contiguous"), pattern="ME*-M", checkpointing=True),
    Case(Plan(cp=8, cp_layout="zigzag"), pattern="ME*-M"),
]


@pytest.mark.parametrize(
    ("size", "cases"),
    [(2, OF_TWO), (4, OF_FOUR), (8, OF_EIGHT)],
    ids=["two", "four", "eight"],
)
def test_processes_compute_what_one_does(size, cases):
    """Loss, norm, every gradient and the parameters after a clipped step; two runs bit for bit."""
    run([partial(_compare, case) for case in cases], size)


def _compare(case: Case, rank: int) -> None:
    compare(case)
