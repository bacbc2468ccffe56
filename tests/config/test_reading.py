"""Every spelling of a config.json gives the same typed config, and a broken one a clear error."""

import json
import math
import warnings

import pytest
import torch

from nemotron_v3.config import NemotronV3Config, canonical_block_type
from tests.config import released

RELEASED = released.folder()
BLOCKS = ("mamba", "attention", "mlp", "mamba")
SMALL = {"hidden_size": 64, "hybrid_override_pattern": "M*-M"}


@pytest.mark.parametrize(
    "spelled",
    [
        {"hybrid_override_pattern": "M*-M"},
        {"hybrid_override_pattern": "M*-M", "num_hidden_layers": 4},
        {"layers_block_type": ["mamba", "attention", "mlp", "mamba"]},
        {"layers_block_type": ["mamba", "attention", "mlp", "mamba"], "num_hidden_layers": 4},
        {"layers_block_type": ["linear_attention", "full_attention", "mlp", "linear_attention"]},
        {"layer_types": ["linear_attention", "full_attention", "mlp", "linear_attention"]},
        {"layers_block_type": ["M", "*", "-", "M"]},
        {"layers_block_type": ["mamba", "full_attention", "-", "M"], "layer_types": None},
    ],
)
def test_every_spelling_of_the_blocks_reads_the_same(spelled):
    config = NemotronV3Config.from_dict(spelled)
    assert config.layers_block_type == BLOCKS
    assert config.num_hidden_layers == 4
    assert config.hybrid_override_pattern == "M*-M"


@pytest.mark.parametrize(
    ("key", "value", "field", "read"),
    [
        ("attention_head_dim", 80, "head_dim", 80),
        ("norm_eps", 1e-6, "layer_norm_epsilon", 1e-6),
        ("rms_norm_eps", 1e-6, "layer_norm_epsilon", 1e-6),
        ("torch_dtype", "bfloat16", "dtype", torch.bfloat16),
        ("dtype", "torch.float16", "dtype", torch.float16),
        ("mamba_proj_bias", True, "use_bias", True),
        ("mamba_n_groups", 4, "n_groups", 4),
        ("mamba_d_conv", 2, "conv_kernel", 2),
        ("mamba_conv_bias", False, "use_conv_bias", False),
        ("mamba_chunk_size", 64, "chunk_size", 64),
        ("mamba_dt_min", 0.002, "time_step_min", 0.002),
        ("mamba_dt_max", 0.2, "time_step_max", 0.2),
        ("mamba_dt_init_floor", 1e-3, "time_step_floor", 1e-3),
        ("mamba_dt_limit", [0.1, 0.5], "time_step_limit", (0.1, 0.5)),
        ("num_local_experts", 4, "n_routed_experts", 4),
        ("mtp_hybrid_override_pattern", "*-", "mtp_layers_block_type", ("attention", "mlp")),
        ("num_key_value_heads", None, "num_key_value_heads", 32),
        ("mamba_ssm_cache_dtype", "bfloat16", "mamba_ssm_cache_dtype", torch.bfloat16),
        ("mamba_ssm_cache_dtype", None, "mamba_ssm_cache_dtype", torch.float32),
        ("eos_token_id", [2, 11], "eos_token_id", [2, 11]),
        ("pad_token_id", None, "pad_token_id", None),
        ("attention_dropout", 0, "attention_dropout", 0.0),
    ],
)
def test_other_names_and_forms(key, value, field, read):
    sizes = {"moe_intermediate_size": 8, "moe_shared_expert_intermediate_size": 8}
    config = NemotronV3Config.from_dict(SMALL | sizes | {key: value})
    assert getattr(config, field) == read
    assert type(getattr(config, field)) is type(read)


@pytest.mark.parametrize(
    "spelled",
    ["Infinity", '{"__float__": "Infinity"}', "1e308", "3.4028234663852886e38"],
)
def test_infinite_limits(tmp_path, spelled):
    path = tmp_path / "config.json"
    path.write_text(
        '{"hybrid_override_pattern": "M", "time_step_limit": [0.0, %s]}' % spelled  # noqa: UP031
    )
    assert NemotronV3Config.from_json(path).time_step_limit == (0.0, math.inf)


def test_a_directory_stands_for_its_config(tmp_path):
    (tmp_path / "config.json").write_text(json.dumps(SMALL))
    assert NemotronV3Config.from_json(tmp_path) == NemotronV3Config.from_json(
        str(tmp_path / "config.json")
    )
    with pytest.raises(FileNotFoundError, match=r"elsewhere"):
        NemotronV3Config.from_json(tmp_path / "elsewhere")


@pytest.mark.parametrize("name", ["num_atention_heads", "hiddenSize", "vocab_szie", "head_dims"])
def test_a_typing_error_names_the_key_that_was_meant(name):
    with pytest.raises(ValueError, match=f"unknown key '{name}' .*77.* did you mean '"):
        NemotronV3Config.from_dict(SMALL | {name: 77})


def test_unknown_keys_are_reported_in_one_warning_and_inert_ones_in_none():
    inert = {"expand": 2, "auto_map": {}, "time_step_rank": 5, "use_mamba_kernels": True}
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        NemotronV3Config.from_dict(SMALL | inert | {"riddle": 3, "mystery": 1})
    assert [str(w.message) for w in caught] == [
        "config keys kept as they are, but nothing reads them: riddle, mystery"
    ]


def test_rotary_keys_get_one_explicit_note():
    with pytest.warns(UserWarning, match="no rotary embedding is applied") as caught:
        NemotronV3Config.from_dict(SMALL | {"rope_theta": 10000, "partial_rotary_factor": 1.0})
    assert len(caught) == 1


@pytest.mark.parametrize(
    ("text", "told"),
    [
        ('{"hidden_size": 64, "hybrid_', "not a whole JSON document"),
        ("", "not a whole JSON document"),
        ("PK\x03\x04", "not a whole JSON document"),
        ("[1, 2]", "holds a JSON list"),
        ('"M*"', "holds a JSON str"),
        ("[" * 100_000, "mostly brackets"),
        ('{"hidden_size": 64, "hidden_size": 32}', "'hidden_size' stands there twice"),
        ('{"hybrid_override_pattern": "M/M"}', "'/' at position 1"),
        ('{"model_type": "llama", "hidden_size": 64}', "model_type is 'llama'"),
    ],
)
def test_a_broken_file_is_named(tmp_path, text, told):
    path = tmp_path / "config.json"
    path.write_text(text)
    with pytest.raises(ValueError, match=told) as caught:
        NemotronV3Config.from_json(path)
    assert str(path) in str(caught.value)


def test_bytes_that_are_no_text_are_named(tmp_path):
    (tmp_path / "config.json").write_bytes(b"\x80\x02}q\x00.")
    with pytest.raises(ValueError, match=r"config\.json"):
        NemotronV3Config.from_json(tmp_path)


@pytest.mark.parametrize(
    ("name", "block"),
    [("mamba", "mamba"), ("linear_attention", "mamba"), ("M", "mamba"), ("*", "attention")]
    + [("full_attention", "attention"), ("-", "mlp"), ("E", "moe"), ("moe", "moe")],
)
def test_canonical_block_type(name, block):
    assert canonical_block_type(name) == block


@pytest.mark.parametrize("name", ["hyena", "", "m", None, ["mamba"]])
def test_an_invalid_block_type_is_refused(name):
    with pytest.raises(ValueError, match="Invalid block_type"):
        canonical_block_type(name)
