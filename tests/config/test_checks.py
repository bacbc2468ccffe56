"""Values and contradictions that are refused, at construction as well as in a file."""

import dataclasses
import math

import pytest
import torch

from nemotron_v3.config import NemotronV3Config

MOE = {
    "layers_block_type": "ME",
    "n_routed_experts": 8,
    "moe_intermediate_size": 16,
    "moe_shared_expert_intermediate_size": 32,
}


def test_a_few_words_make_a_config():
    config = NemotronV3Config(hidden_size=64, layers_block_type="M*-")
    assert config.layers_block_type == ("mamba", "attention", "mlp")
    assert config == NemotronV3Config(hidden_size=64, hybrid_override_pattern="M*-")
    assert config == NemotronV3Config(
        hidden_size=64, layers_block_type=["linear_attention", "full_attention", "mlp"]
    )
    assert config.mamba_ssm_cache_dtype is torch.float32
    assert config.dtype is None
    assert NemotronV3Config(layers_block_type="M", dtype="bfloat16").dtype is torch.bfloat16


def test_derived_sizes():
    config = NemotronV3Config(
        layers_block_type="M", mamba_num_heads=6, mamba_head_dim=5, n_groups=3, ssm_state_size=7
    )
    assert config.mamba_intermediate_size == 30
    assert config.conv_dim == 30 + 2 * 3 * 7
    assert config.in_proj_size == 30 + config.conv_dim + 6


def test_a_config_does_not_change():
    config = NemotronV3Config(layers_block_type="M")
    with pytest.raises(dataclasses.FrozenInstanceError):
        config.hidden_size = 3


@pytest.mark.parametrize(
    ("values", "told"),
    [
        ({"layers_block_type": ()}, r"layers_block_type is empty: .*'MEM\*-'"),
        ({"layers_block_type": "MX*"}, "'X' at position 1 of 'MX"),
        ({"layers_block_type": ["mamba", "rnn"]}, "position 1: Invalid block_type 'rnn'"),
        ({"layers_block_type": 3}, "layers_block_type is 3: give a pattern"),
        ({"hybrid_override_pattern": "MM"}, r"'MM' contradicts layers_block_type 'M\*-'"),
        ({"num_hidden_layers": 4}, r"num_hidden_layers 4 contradicts the 3 blocks of 'M\*-'"),
        ({"num_key_value_heads": 5}, "num_attention_heads 32 is not a multiple of .* 5"),
        ({"mamba_num_heads": 12}, "mamba_num_heads 12 is not a multiple of n_groups 8"),
        ({"chunk_size": 0}, "chunk_size is 0: give a whole number of at least 1"),
        ({"hidden_size": 64.0}, "hidden_size is 64.0"),
        ({"hidden_size": True}, "hidden_size is True"),
        ({"intermediate_size": [8, 16]}, r"intermediate_size is \[8, 16\]"),
        ({"vocab_size": None}, "vocab_size is None"),
        ({"attention_bias": 1}, "attention_bias is 1: give true or false"),
        ({"attention_dropout": 1.0}, r"attention_dropout is 1.0: give .* at least 0 and below 1"),
        ({"layer_norm_epsilon": math.nan}, "layer_norm_epsilon is nan"),
        ({"initializer_range": math.inf}, "initializer_range is inf"),
        ({"mamba_hidden_act": "gelu"}, "mamba_hidden_act is 'gelu', .* use silu"),
        ({"mlp_hidden_act": "swiglu"}, "mlp_hidden_act is 'swiglu', .* use relu2"),
        ({"sliding_window": 512}, "sliding_window is 512"),
        ({"dtype": "int8"}, "dtype is 'int8': give a floating-point torch dtype"),
        ({"dtype": "nn"}, "dtype is 'nn'"),
        ({"mamba_ssm_cache_dtype": 32}, "mamba_ssm_cache_dtype is 32"),
        ({"time_step_min": 0.0}, "time_step_min is 0.0: give a finite number above 0"),
        ({"time_step_min": 0.5}, "time_step_min 0.5 is above time_step_max 0.1"),
        ({"time_step_limit": (0.5, 0.1)}, "give the smaller limit first"),
        ({"time_step_limit": (0.0,)}, "give two numbers"),
        ({"time_step_limit": (0.0, math.nan)}, "holds nan"),
        ({"eos_token_id": "</s>"}, "eos_token_id is '</s>': give a token id"),
        (MOE | {"n_routed_experts": 0}, "moe blocks need n_routed_experts: give"),
        ({"layers_block_type": "E"}, "n_routed_experts, moe_intermediate_size, moe_shared_expert"),
        ({"num_nextn_predict_layers": 1}, "moe blocks need n_routed_experts"),
        (MOE | {"num_experts_per_tok": 9}, "num_experts_per_tok 9 is above the 8 experts"),
        (MOE | {"n_group": 3}, "n_routed_experts 8 is not a multiple of n_group 3"),
        (MOE | {"n_group": 2, "topk_group": 3}, "topk_group 3 is above n_group 2"),
        (MOE | {"n_group": 4, "num_experts_per_tok": 3}, "3 is above the 2 experts to choose from"),
        (MOE | {"n_shared_experts": 2}, "n_shared_experts is 2: only 1 is supported"),
        (MOE | {"routed_scaling_factor": "big"}, "routed_scaling_factor is 'big'"),
    ],
)
def test_refused(values, told):
    with pytest.raises(ValueError, match=told):
        NemotronV3Config(**{"layers_block_type": "M*-"} | values)


@pytest.mark.parametrize(
    ("data", "told"),
    [
        (
            {"head_dim": 64, "attention_head_dim": 80},
            "head_dim 64 contradicts attention_head_dim 80",
        ),
        ({"layer_norm_epsilon": 1e-5, "norm_eps": 1e-6}, "1e-05 contradicts norm_eps 1e-06"),
        ({"dtype": "bfloat16", "torch_dtype": "float16"}, "'bfloat16' contradicts torch_dtype"),
        ({"layers_block_type": ["mamba"]}, r"\['mamba'\] contradicts hybrid_override_pattern"),
        ({"num_hidden_layers": 52}, "num_hidden_layers 52 contradicts the 1 blocks"),
        ({"num_hidden_layers": "1"}, "num_hidden_layers is '1'"),
        ({"rms_norm_eps": "x"}, "rms_norm_eps is 'x'"),
    ],
)
def test_a_file_that_contradicts_itself(data, told):
    with pytest.raises(ValueError, match=told):
        NemotronV3Config.from_dict({"hybrid_override_pattern": "E"} | MOE_WITHOUT_BLOCKS | data)


MOE_WITHOUT_BLOCKS = {key: value for key, value in MOE.items() if key != "layers_block_type"}


def test_use_bias_decides_over_mamba_proj_bias():
    both = {"hybrid_override_pattern": "M", "use_bias": True, "mamba_proj_bias": False}
    assert NemotronV3Config.from_dict(both).use_bias is True


def test_a_dense_model_may_leave_expert_sizes_or_have_some():
    assert not NemotronV3Config(layers_block_type="M-").has_experts
    assert not NemotronV3Config(**MOE | {"layers_block_type": "M-"}).has_experts
    assert NemotronV3Config(
        **MOE | {"layers_block_type": "M-", "num_nextn_predict_layers": 1}
    ).has_experts


def test_replace():
    config = NemotronV3Config(layers_block_type="M*-", hidden_size=64)
    assert config.replace(hidden_size=32) == NemotronV3Config(
        layers_block_type="M*-", hidden_size=32
    )
    assert config.hidden_size == 64
    assert config.replace(hybrid_override_pattern="M").num_hidden_layers == 1
    assert config.replace(layers_block_type=["mlp", "mlp"]).hybrid_override_pattern == "--"
    with pytest.raises(
        TypeError, match="no field 'hidden_sise' to replace: did you mean hidden_si"
    ):
        config.replace(hidden_sise=3)
    with pytest.raises(ValueError, match="contradicts the 3 blocks"):
        config.replace(num_hidden_layers=5)
    with pytest.raises(ValueError, match="not a multiple"):
        config.replace(n_groups=3)
