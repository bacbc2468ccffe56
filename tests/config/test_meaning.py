"""What a file may say in other words, and what would make it another model."""

import json
import math

import pytest

from nemotron_v3 import NemotronV3Config
from nemotron_v3.config.meaning import MEANINGS

PLAIN = {"hybrid_override_pattern": "M*-", "time_step_limit": [0.0, "Infinity"]}


def test_infinity_may_be_text_and_stays_so(tmp_path):
    path = tmp_path / "config.json"
    path.write_text(json.dumps(PLAIN))
    config = NemotronV3Config.from_json(path)
    assert config.time_step_limit == (0.0, math.inf)
    config.to_json(path)
    assert json.loads(path.read_text()) == PLAIN
    config.replace(time_step_limit=(0.5, math.inf)).to_json(path)
    assert json.loads(path.read_text())["time_step_limit"] == [0.5, "Infinity"]
    with pytest.raises(ValueError, match="time_step_limit holds 'infinite'"):
        NemotronV3Config.from_dict(PLAIN | {"time_step_limit": [0.0, "infinite"]})


def test_a_byte_order_mark_is_read_and_written_back(tmp_path):
    path = tmp_path / "config.json"
    path.write_bytes(b"\xef\xbb\xbf" + json.dumps(PLAIN, indent=1).encode())
    before = path.read_bytes()
    config = NemotronV3Config.from_json(path)
    config.to_json(path)
    assert path.read_bytes() == before
    config.replace(vocab_size=7).to_json(path)
    assert path.read_bytes().startswith(b"\xef\xbb\xbf{")
    assert NemotronV3Config.from_json(path).vocab_size == 7


@pytest.mark.parametrize(
    ("letter", "told"),
    [("G", "Gated DeltaNet"), ("D", "sparse attention"), ("+", "latent attention"),
     ("/", "mtp_hybrid_override_pattern"), ("x", "the pattern letters are")],
)  # fmt: skip
def test_a_newer_letter_is_named(letter, told):
    with pytest.raises(ValueError, match=f"{'[' + letter + ']'}.*{told}"):
        NemotronV3Config(hybrid_override_pattern=f"M{letter}*")


def test_a_cut_of_a_pipeline_is_no_block():
    assert NemotronV3Config(hybrid_override_pattern="M*|M-").hybrid_override_pattern == "M*M-"


@pytest.mark.parametrize("key", MEANINGS)
def test_a_key_that_would_change_the_function_is_obeyed_or_refused(key, recwarn):
    for value in MEANINGS[key]:
        NemotronV3Config.from_dict(PLAIN | {key: value})
    assert not recwarn.list
    with pytest.raises(ValueError, match=f"{key} is 'other', which no layer here does"):
        NemotronV3Config.from_dict(PLAIN | {key: "other"})


def test_experts_of_multi_token_prediction_are_the_models_or_told_by_block():
    experts = {"n_routed_experts": 8, "moe_intermediate_size": 8, "num_experts_per_tok": 2,
               "moe_shared_expert_intermediate_size": 8, "num_nextn_predict_layers": 1}  # fmt: skip
    NemotronV3Config.from_dict(PLAIN | experts | {"mtp_n_routed_experts": 8})
    with pytest.raises(ValueError, match="mtp_n_routed_experts is 4 and n_routed_experts 8"):
        NemotronV3Config.from_dict(PLAIN | experts | {"mtp_n_routed_experts": 4})
    blocks = [{"block_type": "attention"}, {"block_type": "moe", "n_routed_experts": 4}]
    config = NemotronV3Config.from_dict(
        PLAIN | experts | {"mtp_n_routed_experts": 4, "mtp_block_configs": blocks}
    )
    assert config.of_mtp_block(1).n_routed_experts == 4


def test_a_text_model_is_found_in_a_config_of_several_modes():
    text = PLAIN | {"model_type": "nemotron_h", "hidden_size": 64}
    for key in ("text_config", "llm_config", "language_config"):
        outer = {"model_type": "nemotron_h_omni", "vision_config": {}, "torch_dtype": "bfloat16"}
        config = NemotronV3Config.from_dict(outer | {key: text})
        assert config.hidden_size == 64 and str(config.dtype) == "torch.bfloat16"
    with pytest.raises(ValueError, match="text_config and llm_config both hold a text model"):
        NemotronV3Config.from_dict({"text_config": text, "llm_config": text})
