"""Configs of other projects and plain objects, through the one border."""

import copy
import json
from pathlib import Path
from types import SimpleNamespace
from unittest.mock import MagicMock, Mock

import pytest
import torch
from transformers import AutoConfig, NemotronHConfig

from nemotron_v3.config import PRESETS, MoEConfig, NemotronV3Config
from tests.config import released

pytestmark = pytest.mark.filterwarnings("ignore:.*rotary embedding", "ignore:config keys")
RELEASED = released.paths()
NO_EXPERTS = {
    "n_routed_experts": 0,
    "moe_intermediate_size": 0,
    "moe_shared_expert_intermediate_size": 0,
}

TINY = {
    "layers_block_type": ["linear_attention", "moe", "full_attention", "mlp"],
    "hidden_size": 48,
    "num_attention_heads": 6,
    "num_key_value_heads": 3,
    "head_dim": 10,
    "mamba_num_heads": 4,
    "mamba_head_dim": 6,
    "n_groups": 2,
    "n_routed_experts": 6,
    "num_experts_per_tok": 3,
    "n_group": 3,
    "topk_group": 2,
    "moe_intermediate_size": 20,
    "moe_shared_expert_intermediate_size": 24,
    "moe_latent_size": 12,
    "mlp_bias": True,
    "use_bias": True,
    "time_step_limit": (0.01, 0.5),
    "eos_token_id": [2, 11],
    "residual_in_fp32": True,
    "layer_norm_epsilon": 1e-6,
    "dtype": "bfloat16",
}


def test_ours_is_returned_itself():
    config = NemotronV3Config(layers_block_type="M")
    assert NemotronV3Config.from_any(config) is config


@pytest.mark.parametrize("path", RELEASED, ids=lambda path: path.stem)
def test_transformers_reads_released_files_to_the_same_model(path):
    theirs = NemotronHConfig(**json.loads(path.read_text()))
    before = copy.deepcopy(theirs.to_dict())
    ours = NemotronV3Config.from_any(theirs)
    read = NemotronV3Config.from_json(path)
    # Its class assumes 8 experts even where no block has any.
    assert ours.replace(**NO_EXPERTS if not ours.has_experts else {}) == read
    assert theirs.to_dict() == before


@pytest.mark.parametrize("changes", [{}, TINY], ids=["default", "tiny"])
def test_what_transformers_writes_is_read_and_written_back(changes, tmp_path):
    theirs = NemotronHConfig(**changes)
    theirs.save_pretrained(tmp_path)
    text = (tmp_path / "config.json").read_text()
    ours = NemotronV3Config.from_json(tmp_path)
    assert ours == NemotronV3Config.from_any(theirs)
    assert ours.hybrid_override_pattern == theirs.hybrid_override_pattern
    ours.to_json(tmp_path)
    assert (tmp_path / "config.json").read_text() == text


def architecture(theirs: NemotronHConfig) -> dict:
    values = theirs.to_dict()
    keys = set(NemotronHConfig().to_dict()) - {"_name_or_path", "architectures"}
    return {key: values[key] for key in keys}


@pytest.mark.parametrize("changes", [{}, TINY], ids=["default", "tiny"])
def test_transformers_loads_what_we_write_to_the_same_model(changes, tmp_path):
    theirs = NemotronHConfig(**changes)
    NemotronV3Config.from_any(theirs).to_json(tmp_path)
    again = AutoConfig.from_pretrained(tmp_path)
    assert isinstance(again, NemotronHConfig)
    assert again.architectures == ["NemotronHForCausalLM"]
    expected, found = architecture(theirs), architecture(again)
    assert list(expected.pop("time_step_limit")) == list(found.pop("time_step_limit"))
    # use_bias decides; mamba_proj_bias has no effect there.
    expected.pop("mamba_proj_bias"), found.pop("mamba_proj_bias")
    assert found == expected


@pytest.mark.parametrize("name", PRESETS)
def test_transformers_loads_our_presets(name, tmp_path):
    ours = NemotronV3Config.preset(name)
    ours.to_json(tmp_path)
    again = NemotronV3Config.from_any(AutoConfig.from_pretrained(tmp_path))
    assert again.replace(**NO_EXPERTS if not ours.has_experts else {}) == ours


def test_a_plain_object_gets_defaults_for_what_it_lacks():
    source = SimpleNamespace(
        hidden_size=48,
        num_attention_heads=6,
        num_key_value_heads=3,
        head_dim=10,
        num_hidden_layers=7,
        torch_dtype="bfloat16",
    )
    before = copy.deepcopy(source)
    config = NemotronV3Config.from_any(source)
    assert source == before
    assert (config.hidden_size, config.head_dim, config.dtype) == (48, 10, torch.bfloat16)
    assert config.attention_bias is False
    # It names no blocks, and none are made up; its depth is kept.
    assert config.layers_block_type == ()
    assert config.num_hidden_layers == 7
    assert config.replace(hidden_size=16).num_hidden_layers == 7
    assert config.replace(num_hidden_layers=3).num_hidden_layers == 3


def test_a_plain_object_may_leave_the_experts_to_a_moe_config():
    source = SimpleNamespace(hidden_size=48, layers_block_type=["mamba", "moe"])
    config = NemotronV3Config.from_any(source)
    assert config.hybrid_override_pattern == "ME"
    with pytest.raises(ValueError, match="moe blocks need n_routed_experts"):
        MoEConfig.from_config(config)


def test_a_plain_object_is_checked_like_a_file():
    with pytest.raises(ValueError, match="mamba_num_heads 6 is not a multiple of n_groups 4"):
        NemotronV3Config.from_any(SimpleNamespace(mamba_num_heads=6, n_groups=4))
    with pytest.raises(ValueError, match="num_hidden_layers 3 contradicts the 2 blocks"):
        NemotronV3Config.from_any(
            SimpleNamespace(layers_block_type=["mamba", "mlp"], num_hidden_layers=3)
        )


class AnswersAll:
    """A double of no known kind."""

    def __getattr__(self, name: str) -> object:
        return object()


class KnowsNothingElse:
    """A config that says None to what it does not hold, and holds it elsewhere."""

    def __init__(self) -> None:
        self.__dict__["held"] = {}

    def __setattr__(self, name: str, value: object) -> None:
        self.held[name] = value

    def __getattr__(self, name: str) -> object:
        return self.held.get(name)


@pytest.mark.parametrize("double", [Mock, MagicMock, AnswersAll])
def test_a_test_double_has_what_was_set_on_it(double):
    source = double()
    source.hidden_size = 48
    source.layers_block_type = ["mamba"]
    source.num_key_value_heads = None
    source.num_attention_heads = 6
    config = NemotronV3Config.from_any(source)
    assert config == NemotronV3Config(
        hidden_size=48, layers_block_type="M", num_attention_heads=6, num_key_value_heads=6
    )


def test_an_object_that_answers_none_to_other_names_is_read():
    source = KnowsNothingElse()
    source.hidden_size = 48
    source.layers_block_type = ["mamba"]
    config = NemotronV3Config.from_any(source)
    assert (config.hidden_size, config.hybrid_override_pattern) == (48, "M")


@pytest.mark.parametrize("source", [None, "nemotron-h-8b", Path("config.json"), NemotronHConfig])
def test_what_is_no_config_is_refused(source):
    with pytest.raises(TypeError, match="cannot read a config from"):
        NemotronV3Config.from_any(source)
