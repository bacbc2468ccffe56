"""Each table by block type has all block types, so that a new one is missing nowhere."""

import pytest

from nemotron_v3.cache.make import STATES
from nemotron_v3.cli import inspect
from nemotron_v3.config import BLOCK_TYPES, backend, blocks, foreign, puzzle
from nemotron_v3.generation.cpu_decode.blocks import BLOCKS
from nemotron_v3.generation.graphs.plan import Plan
from nemotron_v3.layers.block import MIXERS
from nemotron_v3.model.cost import COSTS
from nemotron_v3.train.memory import MIXER_BYTES

TABLES = {
    "config/blocks.py: pattern letters": blocks.LETTERS,
    "config/blocks.py: released words": blocks.RELEASED,
    "config/blocks.py: words of transformers": blocks.RENAMED,
    "config/puzzle.py: sizes of its own": puzzle.SIZES,
    "layers/block.py": MIXERS,
    "cache/make.py": STATES,
    "model/cost.py": COSTS,
    "train/memory.py": MIXER_BYTES,
    "generation/cpu_decode/blocks.py": BLOCKS,
    "cli/inspect.py": inspect.SIZES,
}
# These say more than what concerns block types.
WIDER = {
    "config/backend.py": backend.READ_BY,
    "config/foreign.py": foreign.READ_BY,
}


@pytest.mark.parametrize("place", TABLES)
def test_a_table_has_all_block_types(place):
    assert sorted(TABLES[place]) == sorted(BLOCK_TYPES)


@pytest.mark.parametrize("place", WIDER)
def test_a_wider_table_has_all_block_types(place):
    assert set(WIDER[place]) >= set(BLOCK_TYPES)


def test_a_cuda_graph_knows_all_block_types():
    known = [name.removeprefix("_add_") for name in vars(Plan) if name.startswith("_add_")]
    assert sorted(known) == sorted(BLOCK_TYPES) and all(map(Plan.knows, BLOCK_TYPES))
    assert not Plan.knows("another")


def test_what_works_by_token_has_no_state():
    stateless = {block for block, state in STATES.items() if state is None}
    assert stateless == {block for block, mixer in MIXERS.items() if mixer.is_stateless}
