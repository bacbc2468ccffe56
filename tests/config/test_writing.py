"""A config that was read is written back as it was; a new one looks like a released file."""

import copy
import json
import os
import pickle
from pathlib import Path

import pytest
import torch

from nemotron_v3.config import PRESETS, NemotronV3Config
from tests.config import released

pytestmark = pytest.mark.filterwarnings("ignore:.*rotary embedding", "ignore:config keys")
RELEASED = released.paths()

RENAMED = """{
  "dtype": "bfloat16",
  "layers_block_type": [
    "linear_attention",
    "full_attention"
  ],
  "mamba_proj_bias": false,
  "time_step_limit": [
    0.0,
    {
      "__float__": "Infinity"
    }
  ],
  "mystery": {"kept": [1e-05, 1E5, 0.10, "\\u00e9"]},
  "use_bias": true
}
"""
ONE_LINE = '{"hybrid_override_pattern":"M*", "torch_dtype" : "torch.float32","num_hidden_layers":2}'
WINDOWS = '{\r\n\t"layer_types": ["linear_attention", "mlp"],\r\n\t"norm_eps": 1e-6\r\n}\r\n'


def rewritten(text: str, path: Path, **changes) -> str:
    path.write_bytes(text.encode())
    NemotronV3Config.from_json(path).replace(**changes).to_json(path)
    return path.read_bytes().decode()


@pytest.mark.parametrize("path", RELEASED, ids=lambda path: path.stem)
def test_released_files_come_back_byte_for_byte(path, tmp_path):
    NemotronV3Config.from_json(path).to_json(tmp_path / "again.json")
    assert (tmp_path / "again.json").read_bytes() == path.read_bytes()


@pytest.mark.parametrize("text", [RENAMED, ONE_LINE, WINDOWS])
def test_other_files_come_back_byte_for_byte(text, tmp_path):
    assert rewritten(text, tmp_path / "config.json") == text


@pytest.mark.parametrize("path", RELEASED, ids=lambda path: path.stem)
def test_to_dict_is_the_json(path):
    assert NemotronV3Config.from_json(path).to_dict() == json.loads(path.read_text())
    assert list(NemotronV3Config.from_json(path).to_dict()) == list(json.loads(path.read_text()))


def test_changes_are_spelled_as_the_source_spells_them(tmp_path):
    changed = rewritten(
        RENAMED,
        tmp_path / "config.json",
        layers_block_type="ME*",
        n_routed_experts=4,
        moe_intermediate_size=8,
        moe_shared_expert_intermediate_size=16,
        time_step_limit=(0.25, float("inf")),
        use_bias=False,
    )
    expected = RENAMED.replace('"linear_attention",', '"linear_attention",\n    "moe",')
    expected = expected.replace("    0.0,", "    0.25,").replace("true\n}", "false")
    expected = expected.rstrip() + (
        ',\n  "n_routed_experts": 4,\n  "moe_intermediate_size": 8,\n'
        '  "moe_shared_expert_intermediate_size": 16\n}\n'
    )
    assert changed == expected


def test_every_spelling_of_a_changed_field_changes(tmp_path):
    nano = next(path for path in RELEASED if "Nano-30B" in path.stem).read_text()
    changed = rewritten(
        nano, tmp_path / "config.json", layer_norm_epsilon=1e-6, hybrid_override_pattern="M*"
    )
    expected = nano.replace(": 1e-05", ": 1e-06").replace('layers": 52', 'layers": 2')
    expected = expected.replace("MEMEM*EMEMEM*EMEMEM*EMEMEM*EMEMEM*EMEMEMEM*EMEMEMEME", "M*")
    assert changed == expected


def test_a_change_in_a_one_line_file(tmp_path):
    changed = rewritten(ONE_LINE, tmp_path / "c.json", dtype=torch.bfloat16, attention_bias=True)
    assert changed == (
        '{"hybrid_override_pattern":"M*", "torch_dtype" : "torch.bfloat16",'
        '"num_hidden_layers":2, "attention_bias": true}'
    )


def test_changing_back_gives_the_source_back(tmp_path):
    path = tmp_path / "config.json"
    path.write_text(RENAMED)
    config = NemotronV3Config.from_json(path)
    config.replace(hidden_size=64).replace(hidden_size=config.hidden_size).to_json(path)
    assert path.read_text() == RENAMED


def test_reading_and_writing_leave_a_mapping_alone():
    source = {
        "layers_block_type": ["mamba"],
        "dtype": torch.bfloat16,
        "time_step_limit": (0.0, 1.0),
    }
    before = copy.deepcopy(source)
    config = NemotronV3Config.from_dict(source)
    config.to_dict()["layers_block_type"].append("moe")
    assert source == before
    assert config.to_dict() == {
        "layers_block_type": ["mamba"],
        "dtype": "bfloat16",
        "time_step_limit": [0.0, 1.0],
    }


@pytest.mark.parametrize("name", PRESETS)
def test_a_new_file_reads_the_same(name, tmp_path):
    config = NemotronV3Config.preset(name, time_step_limit=(0.1, float("inf")), pad_token_id=None)
    config.to_json(tmp_path)
    again = NemotronV3Config.from_json(tmp_path)
    assert again == config
    again.to_json(tmp_path / "again.json")
    assert (tmp_path / "again.json").read_bytes() == (tmp_path / "config.json").read_bytes()


@pytest.mark.parametrize(
    ("name", "stem"),
    [
        ("nemotron-h-56b", "Nemotron-H-56B-Base-8K"),
        ("nemotron-3-nano-30b", "NVIDIA-Nemotron-3-Nano-30B-A3B-BF16"),
        ("nemotron-3-super", "NVIDIA-Nemotron-3-Super-120B-A12B-FP8"),
    ],
)
def test_a_new_file_has_keys_and_values_of_the_released_one(name, stem):
    model = json.loads((released.folder() / f"{stem}.json").read_text())
    written = NemotronV3Config.preset(name).to_dict()
    spelled_otherwise = {"dtype", "head_dim", "mamba_ssm_cache_dtype"}
    ours_alone = {"moe_latent_size", "moe_shared_expert_overlap"}
    shared = written.keys() & model.keys()
    assert written.keys() - shared <= spelled_otherwise | ours_alone
    assert {key: written[key] for key in shared} == {key: model[key] for key in shared}
    assert list(written) == sorted(written)
    assert written["architectures"] == ["NemotronHForCausalLM"]
    assert written["model_type"] == "nemotron_h"


def test_a_failed_write_leaves_the_old_file(tmp_path, monkeypatch):
    path = tmp_path / "config.json"
    path.write_text("old")

    def full(self, data):
        with open(self, "wb") as file:
            file.write(data[:10])
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(Path, "write_bytes", full)
    with pytest.raises(OSError, match="No space left"):
        NemotronV3Config(layers_block_type="M").to_json(path)
    assert path.read_text() == "old"
    assert os.listdir(tmp_path) == ["config.json"]


def test_a_missing_directory_is_named(tmp_path):
    with pytest.raises(FileNotFoundError, match=r"nowhere"):
        NemotronV3Config(layers_block_type="M").to_json(tmp_path / "nowhere" / "config.json")


def test_copies_keep_the_spelling(tmp_path):
    path = tmp_path / "config.json"
    path.write_text(RENAMED)
    config = NemotronV3Config.from_json(path)
    for again in (copy.deepcopy(config), pickle.loads(pickle.dumps(config))):
        assert again == config
        assert hash(again) == hash(config)
        again.to_json(path)
        assert path.read_text() == RENAMED
