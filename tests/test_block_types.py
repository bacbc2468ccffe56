"""Each table by block type has all block types, so that a new one is missing nowhere.

`PLACES` names each file that speaks of one. After a new type the last test fails until its author
has been to all of them.
"""

import ast
import inspect
from types import SimpleNamespace

import pytest
import torch

from nemotron_v3 import NemotronHybridCache
from nemotron_v3.cache.make import STATES
from nemotron_v3.cli.inspect import SIZES
from nemotron_v3.config import BLOCK_TYPES, backend, blocks, foreign, puzzle
from nemotron_v3.generation.cpu_decode.blocks import BLOCKS
from nemotron_v3.generation.graphs.plan import Plan
from nemotron_v3.layers.block import MIXERS
from nemotron_v3.model.cost import (
    COSTS,
    conv_state_bytes,
    kv_bytes_per_token,
    ssm_state_bytes,
)
from nemotron_v3.nemo.model import Block
from nemotron_v3.train.memory import MIXER_BYTES
from tests.models import tiny_config
from tests.test_architecture import PACKAGE

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
    "cli/inspect.py": SIZES,
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


@pytest.mark.parametrize("block", BLOCK_TYPES)
def test_the_bytes_of_a_state_are_those_of_the_cache(block):
    """So that none of `model/cost.py`'s forgets a type."""
    config, tokens = tiny_config(blocks.LETTERS[block], dtype=torch.bfloat16), 7
    cache = NemotronHybridCache(config, 1, max_length=tokens)
    held = sum(t.nbytes for state in cache.states.values() for t in state.tensors().values())
    told = tokens * kv_bytes_per_token(config, config.dtype) + ssm_state_bytes(config)
    assert held == told + conv_state_bytes(config, config.dtype)


def test_a_block_of_others_is_taken_for_no_other_kind(monkeypatch):
    """What has branches by type, and not a table, refuses a type that it does not know."""
    fake = SimpleNamespace(
        norm=torch.nn.Identity(), mixer=torch.nn.Identity(), block_type="window", layer_idx=0,
        residual_in_fp32=False, settings=SimpleNamespace(config=tiny_config("-")),
    )  # fmt: skip
    with pytest.raises(ValueError, match="a block of type 'window' is not known here"):
        Block.forward(fake, torch.ones(1, 2, 48))
    layers = pytest.importorskip("nemotron_v3.hf.layers")
    monkeypatch.setattr(layers, "canonical_block_type", lambda name: name)
    with pytest.raises(ValueError, match="a block of type 'window' is not known here"):
        inspect.unwrap(layers.NemotronHBlock.forward)(fake, torch.ones(1, 2, 48), context=object())


# What a new block type may need in each file that names one, or a class that belongs to one.
PLACES = {
    "adapters/targets.py": "groups of projections that an adapter can have",
    "cache/cache.py": "what may be taken back how far; `update` and its like",
    "cache/checks.py": "checks of what a layer brings",
    "cache/file.py": "how its state's shapes follow from the lengths",
    "cache/make.py": "its state (table)",
    "cache/outside.py": "its state by the names that other caches have",
    "cache/states.py": "a class of state; how several are joined",
    "cache/way_back.py": "whether new tokens leave what it holds of earlier ones alone",
    "cli/inspect.py": "its sizes in words (table)",
    "cli/inspect_weights.py": "names of its tensors",
    "config/backend.py": "the choices that it reads (table)",
    "config/blocks.py": "its letter and its words (tables)",
    "config/checks.py": "checks of its sizes, block by block",
    "config/foreign.py": "the fields that it reads of another's config (table)",
    "config/model.py": "fields that are written only where it is there",
    "config/puzzle.py": "sizes that a block may have for itself (table)",
    "config/settings.py": "its fields",
    "generation/cpu_decode/blocks.py": "a decode step on a CPU (table)",
    "generation/graphs/fits.py": "what of it no graph can do",
    "generation/graphs/slots.py": "its state in a graph's buffers; others are refused",
    "hf/context.py": "masks by block type",
    "hf/layers.py": "transformers' block; others are refused",
    "hf/report.py": "its ops in the report",
    "hf/states.py": "what transformers' cache holds of it",
    "layers/attention.py": "itself",
    "layers/block.py": "how it is made (table); the names of other code for it",
    "layers/mamba2.py": "itself",
    "layers/mlp.py": "itself",
    "layers/moe/moe.py": "itself",
    "model/cost.py": "its weights and FLOPs (table); the bytes of its state",
    "model/dtypes.py": "tensors of it that stay fp32",
    "model/model.py": "what a recomputation has to remember",
    "model/report.py": "its ops in the report",
    "nemo/model.py": "NeMo's block; others are refused",
    "parallel/costs.py": "what it sends where processes share tokens or experts",
    "parallel/experts.py": "whether it has experts",
    "parallel/parallelize.py": "whether it has experts",
    "parallel/prefill.py": "its state where processes share a prompt; others are refused",
    "train/details.py": "kinds of parameters within it",
    "train/memory.py": "what training keeps of it (table); what shared tokens add",
    "train/plan.py": "biases of routers, which no optimiser trains",
}
WORDS = {*BLOCK_TYPES, *blocks.RENAMED.values()}
CLASSES = {
    *("NemotronV3Attention", "NemotronV3Mamba2Mixer", "NemotronV3MLP", "NemotronV3MoE"),
    *("KeyValueState", "MambaState", "AttentionWeights", "Mamba2Weights"),
}


def names_a_type(source: str) -> bool:
    """Whether code names a block type, or uses a class that belongs to one."""
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.Constant) and node.value in WORDS:
            return True
        name = getattr(node, "id", getattr(node, "attr", None))
        if isinstance(node, ast.Name | ast.Attribute) and name in CLASSES:
            return True
    return False


def test_each_file_that_names_a_block_type_is_in_the_list():
    rooms = [path for path in PACKAGE.iterdir() if path.is_dir() and path.name != "ops"]
    files = {
        str(path.relative_to(PACKAGE))
        for room in rooms
        for path in room.rglob("*.py")
        if path.name != "__init__.py" and names_a_type(path.read_text(encoding="utf-8"))
    }
    assert sorted(files) == sorted(PLACES)


def test_all_places_have_been_seen_for_each_block_type():
    """A new type is added here once its author has been to all of `PLACES`, to `layers/carry.py`
    (tokens of other segments and processes) and to the ops."""
    assert set(BLOCK_TYPES) == {"mamba", "attention", "mlp", "moe"}
