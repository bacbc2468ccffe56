"""Costs against the published sizes of the released models, and against each other."""

from math import prod

import pytest
import torch

from nemotron_v3.config import BLOCK_TYPES, PRESETS, NemotronV3Config
from nemotron_v3.model import cost

KIB, MIB = 2**10, 2**20

# parameters, with multi-token prediction, active and active without the embedding in billions,
# training GFLOP a token at 4,096, KV bytes a token, SSM and conv state in MiB. Totals of 8B, Nano
# 4B, Super and Lightning are those of the published checkpoints.
PUBLISHED = {
    "nemotron-h-4b": (4489223040, 4489223040, 4.49, 4.09, 25.38, 16, 84.0, 1.69),
    "nemotron-h-8b": (8100852736, 8100852736, 8.10, 7.56, 46.31, 16, 96.0, 1.88),
    "nemotron-h-47b": (46791554816, 46791554816, 46.79, 45.72, 279.26, 20, 720.0, 7.03),
    "nemotron-h-56b": (56324350464, 56324350464, 56.32, 55.25, 338.26, 40, 864.0, 8.44),
    "nemotron-nano-9b-v2": (8888227328, 8888227328, 8.89, 8.30, 51.05, 16, 135.0, 2.53),
    "nemotron-nano-12b-v2": (12310001152, 12310001152, 12.31, 11.64, 71.35, 24, 140.0, 2.62),
    "nemotron-3-nano-4b": (3973556832, 3973556832, 3.97, 3.56, 22.31, 16, 78.8, 1.56),
    "nemotron-3-nano-30b": (31577940288, 31577940288, 3.58, 3.23, 20.22, 6, 46.0, 1.08),
    "nemotron-3-super": (120668707840, 123611033088, 12.77, 12.23, 75.08, 8, 160.0, 3.12),
    "nemotron-3-ultra": (549308993536, 560524603904, 56.06, 54.99, 334.42, 12, 384.0, 6.75),
    "nemotron-3.5-lightning": (31577940288, 32913266240, 3.58, 3.23, 20.22, 6, 46.0, 1.08),
}

TENSORS = {
    "nemotron-h-8b": 311,
    "nemotron-h-56b": 701,
    "nemotron-3-nano-4b": 263,
    "nemotron-3-nano-30b": 6243,
    "nemotron-3-super": 42683,
    "nemotron-3-ultra": 51023,
    "nemotron-3.5-lightning": 6513,
}

TINY = NemotronV3Config(
    layers_block_type="ME*-",
    vocab_size=50,
    hidden_size=12,
    num_attention_heads=6,
    num_key_value_heads=2,
    head_dim=5,
    mamba_num_heads=4,
    mamba_head_dim=3,
    n_groups=2,
    ssm_state_size=7,
    conv_kernel=3,
    intermediate_size=20,
    n_routed_experts=8,
    num_experts_per_tok=3,
    moe_intermediate_size=9,
    moe_shared_expert_intermediate_size=11,
    moe_latent_size=5,
    num_nextn_predict_layers=2,
)


@pytest.mark.parametrize("name", PRESETS)
def test_the_released_models(name):
    config = NemotronV3Config.preset(name)
    total, with_mtp, active, without_embedding, gflop, kv, ssm, conv = PUBLISHED[name]
    count = cost.parameters(config)
    assert (count.total, count.with_mtp) == (total, with_mtp)
    assert round(count.active / 1e9, 2) == active
    assert round(count.active_without_embedding / 1e9, 2) == without_embedding
    assert round(cost.training_flops(config, 4096) / 1e9, 2) == gflop
    assert cost.kv_bytes_per_token(config, torch.bfloat16) == kv * KIB
    assert cost.ssm_state_bytes(config) / MIB == pytest.approx(ssm, abs=0.051)
    assert cost.conv_state_bytes(config, torch.bfloat16) / MIB == pytest.approx(conv, abs=0.0051)


@pytest.mark.parametrize(("name", "tensors"), TENSORS.items())
def test_tensors_on_disk(name, tensors):
    assert cost.checkpoint_tensors(NemotronV3Config.preset(name)) == tensors


def test_flops_follow_the_written_formulas():
    config = TINY
    D, S, V = 12, 100, 50
    inner, conv_dim, N, W, heads = 12, 12 + 2 * 2 * 7, 7, 3, 4
    formulas = {
        "mamba": 6 * D * (inner + conv_dim + heads)
        + 6 * inner * D
        + 21 * inner * N
        + 6 * W * conv_dim,
        "attention": 6 * D * 5 * (2 * 6 + 2 * 2) + 6 * 6 * 5 * S,
        "mlp": 12 * D * 20,
        "moe": 12 * 3 * 5 * 9 + 12 * D * 11 + 6 * D * 8 + 12 * D * 5,
    }
    for block, flops in formulas.items():
        assert 3 * cost.block_flops(config, block, S) == flops
    head = 6 * D * V
    assert cost.training_flops(config, S) == sum(formulas.values()) + head


def test_only_the_chosen_experts_are_active():
    count = cost.parameters(TINY)
    idle = (8 - 3) * 2 * 9 * 5
    assert count.total - count.active == idle
    every = TINY.replace(num_experts_per_tok=8)
    assert cost.parameters(every).active == count.total


def test_a_tied_head_is_counted_once_and_stays_active():
    untied, tied = cost.parameters(TINY), cost.parameters(TINY.replace(tie_word_embeddings=True))
    assert untied.total - tied.total == 50 * 12
    assert tied.active_without_embedding == tied.active == untied.active_without_embedding
    assert cost.forward_flops(TINY, 9) == cost.forward_flops(
        TINY.replace(tie_word_embeddings=True), 9
    )


@pytest.mark.parametrize(
    ("changes", "block", "parameters", "tensors"),
    [
        ({"use_bias": True}, "mamba", (2 * 12 + 2 * 2 * 7 + 4) + 12, 2),
        ({"use_conv_bias": False}, "mamba", -(12 + 2 * 2 * 7), -1),
        ({"attention_bias": True}, "attention", 30 + 10 + 10 + 12, 4),
        ({"mlp_bias": True}, "mlp", 20 + 12, 2),
        ({"mlp_bias": True}, "moe", (11 + 12) + (5 + 12), 4),
        ({"moe_latent_size": None}, "moe", 8 * 2 * 9 * (12 - 5) - 2 * 12 * 5, -2),
    ],
)
def test_what_a_switch_adds(changes, block, parameters, tensors):
    before = cost.block_weights(TINY, block)
    after = cost.block_weights(TINY.replace(**changes), block)
    assert sum(w.parameters for w in after) - sum(w.parameters for w in before) == parameters
    assert sum(w.copies for w in after) - sum(w.copies for w in before) == tensors


def test_checkpoint_bytes_keep_the_correction_bias_in_fp32():
    count = cost.parameters(TINY)
    moe_blocks = 1 + 2  # one in the model, one in each depth of multi-token prediction
    assert cost.checkpoint_bytes(TINY, torch.bfloat16) == 2 * count.with_mtp + 2 * 8 * moe_blocks
    assert cost.checkpoint_bytes(TINY, torch.float32) == 4 * count.with_mtp
    assert cost.checkpoint_bytes(TINY, torch.float64) == 8 * count.with_mtp


def test_state_bytes():
    assert cost.kv_bytes_per_token(TINY, torch.float32) == 2 * 2 * 5 * 4
    assert cost.ssm_state_bytes(TINY) == 4 * 3 * 7 * 4
    half = TINY.replace(mamba_ssm_cache_dtype="bfloat16")
    assert cost.ssm_state_bytes(half) == 4 * 3 * 7 * 2
    assert cost.conv_state_bytes(TINY, torch.bfloat16) == (12 + 2 * 2 * 7) * 3 * 2


@pytest.mark.parametrize("block", BLOCK_TYPES)
def test_a_weight_has_the_elements_of_its_shape(block):
    for weight in cost.block_weights(TINY, block):
        assert weight.parameters == weight.copies * prod(weight.shape)
        assert weight.active <= weight.parameters


@pytest.mark.parametrize("seq_len", [0, -3, float("nan")])
def test_a_length_below_one_is_refused(seq_len):
    with pytest.raises(ValueError, match="give at least 1 token"):
        cost.forward_flops(TINY, seq_len)
