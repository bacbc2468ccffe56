"""Configs of blocks with sizes of their own, read, refused and written back."""

import json
from dataclasses import dataclass
from types import SimpleNamespace

import pytest

from nemotron_v3 import NemotronV3Config
from nemotron_v3.config.puzzle import BlockConfig

BLOCKS = [
    {"block_type": "mamba"},
    {
        "block_type": "moe",
        "moe_intermediate_size": 1280,
        "num_experts_per_tok": 4,
        "n_routed_experts": 256,
        "moe_latent_size": 1024,
        "moe_shared_expert_intermediate_size": 5376,
    },
    {"block_type": "attention"},
    {"block_type": "moe", "moe_intermediate_size": 2688, "num_experts_per_tok": 18},
]
MTP = [
    {"block_type": "attention"},
    {
        "block_type": "moe",
        "moe_intermediate_size": 2688,
        "n_routed_experts": 512,
        "num_experts_per_tok": 22,
        "moe_latent_size": 1024,
        "moe_shared_expert_intermediate_size": 5376,
    },
]
FILE = {
    "architectures": ["NemotronHPuzzleForCausalLM"],
    "model_type": "nemotron_h_puzzle",
    "hidden_size": 4096,
    "num_hidden_layers": 4,
    "block_configs": BLOCKS,
    "mtp_block_configs": MTP,
    "num_nextn_predict_layers": 1,
    "mtp_hybrid_override_pattern": "*E",
}


def write(path, data):
    (path / "config.json").write_text(json.dumps(data, indent=2))
    return path / "config.json"


def test_blocks_come_from_their_entries_and_what_is_not_said_from_the_mtp_blocks(tmp_path):
    config = NemotronV3Config.from_json(write(tmp_path, FILE))
    assert config.hybrid_override_pattern == "ME*E"
    told = [config.of_block(i) for i in (1, 3)]
    assert [c.moe_intermediate_size for c in told] == [1280, 2688]
    assert [c.num_experts_per_tok for c in told] == [4, 18]
    assert [c.n_routed_experts for c in told] == [256, 512]
    assert config.of_mtp_block(1).num_experts_per_tok == config.num_experts_per_tok == 22
    assert (config.n_group, config.topk_group) == (1, 1)
    assert hash(config) == hash(NemotronV3Config.from_dict(FILE))


def test_what_the_file_says_of_the_model_is_kept(tmp_path):
    config = NemotronV3Config.from_dict(FILE | {"n_routed_experts": 128})
    assert config.of_block(3).n_routed_experts == 128
    assert config.of_mtp_block(1).n_routed_experts == 512


@dataclass
class Entry:
    block_type: str
    moe_intermediate_size: int | None = None


def test_entries_may_be_objects():
    entries = [SimpleNamespace(**entry) for entry in BLOCKS]
    source = SimpleNamespace(**FILE | {"block_configs": entries})
    config = NemotronV3Config.from_any(source)
    assert config.block_configs == NemotronV3Config.from_dict(FILE).block_configs
    made = NemotronV3Config(
        block_configs=[Entry("mamba"), Entry("moe", 24), Entry("moe")],
        n_routed_experts=4, moe_intermediate_size=8, moe_shared_expert_intermediate_size=8,
    )  # fmt: skip
    assert [made.of_block(i).moe_intermediate_size for i in (1, 2)] == [24, 8]


def test_null_says_that_a_block_has_no_latent_size_and_nothing_else():
    blocks = [BLOCKS[1] | {"moe_latent_size": None, "n_routed_experts": None}, *BLOCKS[1:]]
    config = NemotronV3Config.from_dict(FILE | {"block_configs": blocks})
    assert config.of_block(0).moe_latent_size is None
    assert config.of_block(0).n_routed_experts == 512


def test_a_file_is_written_back_as_it_was_and_changes_alone_are_changed(tmp_path):
    path = write(tmp_path, FILE)
    config = NemotronV3Config.from_json(path)
    before = path.read_bytes()
    config.to_json(path)
    assert path.read_bytes() == before
    some = config.of_layers([1, 2])
    some.to_json(path)
    data = json.loads(path.read_text())
    assert data["block_configs"] == BLOCKS[1:3] and data["num_hidden_layers"] == 2
    assert NemotronV3Config.from_json(path) == some


def test_a_new_config_says_that_it_is_a_puzzle():
    config = NemotronV3Config.preset(
        "nemotron-3-nano-30b",
        layers_block_type="EE",
        block_configs=[{"block_type": "moe", "n_routed_experts": 4, "num_experts_per_tok": 2},
                       {"block_type": "moe"}],
    )  # fmt: skip
    data = config.to_dict()
    assert data["model_type"] == "nemotron_h_puzzle"
    assert NemotronV3Config.from_dict(data) == config
    plain = config.replace(block_configs=())
    assert plain.to_dict()["model_type"] == "nemotron_h"


def test_a_list_of_widths_is_one_for_each_mlp(tmp_path):
    data = {"hybrid_override_pattern": "M-*-", "intermediate_size": [24, 40]}
    path = write(tmp_path, data)
    config = NemotronV3Config.from_json(path)
    assert [config.of_block(i).intermediate_size for i in (1, 3)] == [24, 40]
    assert config.block_configs[1] == BlockConfig("mlp", (("intermediate_size", 24),))
    before = path.read_bytes()
    config.to_json(path)
    assert path.read_bytes() == before
    config.of_layers([0, 3]).to_json(path)
    assert json.loads(path.read_text())["intermediate_size"] == [40]
    assert NemotronV3Config.from_json(path) == config.of_layers([0, 3])
    with pytest.raises(ValueError, match="lists 2 widths for 1 mlp blocks"):
        NemotronV3Config.from_dict(data | {"hybrid_override_pattern": "M-"})


WRONG = [
    ({"block_configs": BLOCKS[:3]}, "num_hidden_layers 4 contradicts the 3 blocks"),
    ({"layers_block_type": ["moe"] * 4}, r"block_configs\[0\] is a mamba block, the .* say moe"),
    ({"block_configs": [{}]}, r"block_configs\[0\] is \{\}: give its block_type"),
    ({"block_configs": {"a": 1}}, "give a list with an entry a block"),
    ({"block_configs": [{"block_type": "gdn"}]}, r"block_configs\[0\]: Invalid block_type 'gdn'"),
    (
        {"block_configs": [BLOCKS[0] | {"mamba_num_heads": 4}, *BLOCKS[1:]]},
        r"block_configs\[0\].mamba_num_heads is 4, which a mamba block cannot have for itself",
    ),
    (
        {"block_configs": [*BLOCKS[:3], {"block_type": "moe", "moe_intermediat_size": 8}]},
        r"block_configs\[3\].moe_intermediat_size is 8, .* that is n_routed_experts",
    ),
    (
        {"block_configs": [*BLOCKS[:3], {"block_type": "moe", "num_experts_per_tok": 513}]},
        "num_experts_per_tok 513 is above the 512 experts",
    ),
    (
        {"block_configs": [*BLOCKS[:3], {"block_type": "moe", "moe_intermediate_size": 0}]},
        r"block_configs\[3\].moe_intermediate_size is 0: give a whole number",
    ),
    ({"mtp_block_configs": MTP[1:]}, "mtp_block_configs has 1 entries for 2 blocks"),
    ({"intermediate_size": [1]}, "intermediate_size is a list beside block_configs"),
]  # fmt: skip


@pytest.mark.parametrize(("change", "message"), WRONG)
def test_entries_that_cannot_be_are_named(change, message):
    with pytest.raises(ValueError, match=message):
        NemotronV3Config.from_dict(FILE | change)


def test_a_setting_that_is_the_models_may_stand_in_an_entry():
    blocks = [BLOCKS[0] | {"mamba_num_heads": 128, "sliding_window": None}, *BLOCKS[1:]]
    NemotronV3Config.from_dict(FILE | {"block_configs": blocks})
