"""A layer alone checks what it reads of a foreign config; a whole model checks all of it."""

from types import SimpleNamespace

import pytest
import torch

from nemotron_v3 import NemotronHybridCache, NemotronV3Model
from nemotron_v3.config import NemotronV3Config
from nemotron_v3.config.foreign import READ_BY
from nemotron_v3.config.spelling import settings_of
from nemotron_v3.layers import NemotronV3Attention, NemotronV3Block, NemotronV3Mamba2Mixer
from nemotron_v3.layers.mlp import NemotronV3MLP

SIZES = {
    "vocab_size": 64, "hidden_size": 32, "num_attention_heads": 4, "num_key_value_heads": 2,
    "head_dim": 8, "mamba_num_heads": 4, "mamba_head_dim": 8, "n_groups": 2, "ssm_state_size": 8,
    "intermediate_size": 48, "n_routed_experts": 4, "num_experts_per_tok": 2, "chunk_size": 16,
    "moe_intermediate_size": 16, "moe_shared_expert_intermediate_size": 16,
    "layers_block_type": ["attention", "mlp", "moe", "mamba"],
}  # fmt: skip
KINDS = SIZES["layers_block_type"]


def foreign(**changes):
    return SimpleNamespace(**SIZES | changes)


# A value that no model takes, and the kinds of block that read it.
WRONG = [
    ({"mamba_num_heads": 6, "n_groups": 4}, {"mamba"}),
    ({"mamba_hidden_act": "gelu"}, {"mamba"}),
    ({"time_step_min": 0.5}, {"mamba"}),
    ({"mlp_hidden_act": "silu"}, {"mlp", "moe"}),
    ({"intermediate_size": 0}, {"mlp"}),
    ({"n_shared_experts": 2}, {"moe"}),
    ({"num_experts_per_tok": 9}, {"moe"}),
    ({"num_key_value_heads": 3}, {"attention"}),
    ({"sliding_window": 16}, {"attention"}),
    ({"eos_token_id": "x"}, set()),
    ({"use_cache": "yes"}, set()),
    ({"mamba_ssm_cache_dtype": "int8"}, set()),
    ({"hidden_dropout": 0.1}, set(KINDS)),
    ({"resid_pdrop": 0.1}, set(KINDS)),
]


@pytest.mark.parametrize(("changes", "readers"), WRONG, ids=[next(iter(c)) for c, _ in WRONG])
def test_a_block_refuses_what_it_reads_and_a_model_all(changes, readers):
    config = foreign(**changes)
    for number, kind in enumerate(KINDS):
        if kind in readers:
            with pytest.raises(ValueError, match=next(iter(changes))):
                NemotronV3Block(config, number)
        else:
            block, same = NemotronV3Block(config, number), NemotronV3Block(foreign(), number)
            block.load_state_dict(same.state_dict())
            x = torch.randn(1, 5, 32)
            assert torch.equal(block(x), same(x))
    with pytest.raises(ValueError, match=next(iter(changes))):
        NemotronV3Model(config)


def test_a_layer_alone_reads_no_other():
    config = foreign(mlp_hidden_act="silu", mamba_hidden_act="gelu", hidden_dropout=0.5)
    assert NemotronV3Attention(config).head_dim == 8
    config = foreign(sliding_window=16, mlp_hidden_act="silu", mamba_hidden_act="swish")
    mixer = NemotronV3Mamba2Mixer(config, 3)
    assert mixer.activation == "swish"
    NemotronV3MLP.from_config(foreign(sliding_window=16))
    cache = NemotronHybridCache(config, 1)
    mixer(torch.randn(1, 4, 32), past_key_values=cache)
    assert cache.get_seq_length() == 4


def test_swish_is_the_other_name_of_silu():
    x = torch.randn(1, 6, 32)
    mixer, same = (NemotronV3Mamba2Mixer(foreign(mamba_hidden_act=a), 3) for a in ("swish", "silu"))
    same.load_state_dict(mixer.state_dict())
    assert torch.equal(mixer(x), same(x))
    told = {"hybrid_override_pattern": "M", "mamba_hidden_act": "swish"}
    assert NemotronV3Config.from_dict(told).to_dict() == told


@pytest.mark.parametrize("kind", KINDS)
def test_the_announced_number_of_layers_is_believed_by_a_layer(kind):
    config = foreign(num_hidden_layers=16, layers_block_type=[kind])
    torch.manual_seed(0)
    block = NemotronV3Block(config, 0)
    assert block.block_type == kind and block.config.num_hidden_layers == 16
    torch.manual_seed(0)
    one = NemotronV3Block(foreign(num_hidden_layers=1, layers_block_type=[kind]), 0)
    for (name, drawn), (_, whole) in zip(
        block.named_parameters(), one.named_parameters(), strict=True
    ):
        shrunk = any(part in name for part in ("down_proj", "out_proj", "o_proj"))
        torch.testing.assert_close(drawn, whole / 4 if shrunk else whole)
    with pytest.raises(ValueError, match="layer_idx 3 is outside the model's 1 layers"):
        NemotronV3Block(config, 3)
    with pytest.raises(ValueError, match="num_hidden_layers 16 contradicts the 1 blocks"):
        NemotronV3Model(config)


def test_an_attention_layer_announces_what_the_config_says():
    config = foreign(num_hidden_layers=6)
    assert NemotronV3Attention(config).num_hidden_layers == 6
    assert NemotronV3Attention(foreign()).num_hidden_layers == 4


def test_the_table_names_fields_of_the_config():
    for part, names in READ_BY.items():
        assert set(names) <= set(settings_of(NemotronV3Config)), part


@pytest.mark.parametrize(
    "told", [{"hidden_dropout": 0.1}, {"embd_pdrop": 0.1}, {"hidden_dropout_prob": 0.5}]
)
def test_dropout_that_never_acts_is_refused(told):
    with pytest.raises(ValueError, match=f"{next(iter(told))} is 0"):
        NemotronV3Config.from_dict({"hybrid_override_pattern": "M-"} | told)
    if "hidden_dropout" in told:
        with pytest.raises(ValueError, match="hidden_dropout is 0.1.*set it to 0.0"):
            NemotronV3Config(layers_block_type="M-", **told)
