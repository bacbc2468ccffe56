"""Each room has one table of block types, and all have the same."""

from nemotron_v3.cache.make import STATES
from nemotron_v3.config import BLOCK_TYPES
from nemotron_v3.generation.cpu_decode.blocks import BLOCKS
from nemotron_v3.layers.block import MIXERS
from nemotron_v3.model.cost import COSTS

TABLES = {"layers": MIXERS, "cache": STATES, "model": COSTS, "generation": BLOCKS}


def test_every_room_knows_the_same_block_types():
    rows = {room: sorted(table) for room, table in TABLES.items()}
    assert rows == dict.fromkeys(TABLES, sorted(BLOCK_TYPES))


def test_what_works_by_token_has_no_state():
    stateless = {block for block, state in STATES.items() if state is None}
    assert stateless == {block for block, mixer in MIXERS.items() if mixer.by_token}
