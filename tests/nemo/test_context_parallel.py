"""Context parallelism by NeMo AutoModel's objects, in two and in four processes."""

import pytest

pytest.importorskip(
    "nemo_automodel.components.distributed.context_parallel",
    reason="this version has no context parallelism",
)
from tests.nemo import shared_tokens
from tests.parallel.processes import run

pytestmark = pytest.mark.integration


@pytest.mark.parametrize("size", [2, 4])
def test_a_share_of_the_tokens_gives_the_numbers_of_all(size):
    run([shared_tokens.layers, shared_tokens.models, shared_tokens.refusals], size)
