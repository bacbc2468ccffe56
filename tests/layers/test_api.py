"""The documented API of the four layers: signatures, attributes, block types, defaults, errors."""

import inspect
from types import SimpleNamespace

import pytest
import torch
from transformers import NemotronHConfig

from nemotron_v3 import BackendConfig, MoEConfig, parameter_groups, report
from nemotron_v3.layers import (
    NemotronV3Attention,
    NemotronV3Block,
    NemotronV3Mamba2Mixer,
    NemotronV3MambaRMSNormGated,
    NemotronV3MoE,
)
from nemotron_v3.layers.mlp import NemotronV3MLP
from nemotron_v3.layers.norm import NemotronV3RMSNorm
from tests.models import tiny_config

SIGNATURES = {
    NemotronV3Attention: ["config", "backend"],
    NemotronV3Attention.forward: [
        "hidden_states", "attention_mask", "past_key_values", "layer_idx", "attn_kwargs",
    ],
    NemotronV3Attention.init_weights: [
        "num_hidden_layers", "rescale_prenorm_residual", "buffer_device",
    ],
    NemotronV3MambaRMSNormGated: ["hidden_size", "group_size", "eps"],
    NemotronV3MambaRMSNormGated.forward: ["hidden_states", "gate"],
    NemotronV3Mamba2Mixer.forward: [
        "hidden_states", "attention_mask", "past_key_values", "cache_position", "kwargs",
    ],
    NemotronV3Mamba2Mixer.init_weights: [
        "num_hidden_layers", "rescale_prenorm_residual", "buffer_device",
    ],
    NemotronV3Block: ["config", "layer_idx", "moe_config", "backend", "block_type"],
    NemotronV3Block.forward: [
        "hidden_states", "attention_mask", "past_key_values", "cache_position", "attn_kwargs",
    ],
    NemotronV3Block.init_weights: ["buffer_device"],
}  # fmt: skip


@pytest.mark.parametrize("function", SIGNATURES, ids=lambda f: f.__qualname__)
def test_signatures_are_the_documented_ones(function):
    names = [name for name in inspect.signature(function).parameters if name != "self"]
    assert names == SIGNATURES[function]


def test_the_mixer_takes_its_two_documented_arguments_by_position():
    names = list(inspect.signature(NemotronV3Mamba2Mixer).parameters.values())
    assert [p.name for p in names if p.kind is p.POSITIONAL_OR_KEYWORD] == ["config", "layer_idx"]
    assert all(p.default is not p.empty for p in names if p.kind is p.KEYWORD_ONLY)


def test_attention_attributes():
    layer = NemotronV3Attention(tiny_config(attention_bias=True, attention_dropout=0.25))
    assert layer.backend == BackendConfig()
    assert (layer.attention_bias, layer.attention_dropout) == (True, 0.25)
    assert (layer.num_attention_heads, layer.num_key_value_heads, layer.head_dim) == (4, 2, 20)
    assert (layer.hidden_size, layer.num_hidden_layers) == (48, 7)
    assert layer.q_proj.weight.shape == layer.o_proj.weight.T.shape == (80, 48)
    assert layer.k_proj.weight.shape == layer.v_proj.weight.shape == (40, 48)
    for projection in (layer.q_proj, layer.k_proj, layer.v_proj, layer.o_proj):
        assert torch.count_nonzero(projection.bias) == 0


def test_mixer_attributes():
    layer = NemotronV3Mamba2Mixer(tiny_config(time_step_limit=(0.01, 0.5)), layer_idx=4)
    assert layer.activation == "silu"
    assert (layer.num_heads, layer.head_dim, layer.intermediate_size) == (6, 10, 60)
    assert (layer.n_groups, layer.ssm_state_size, layer.conv_dim) == (2, 16, 60 + 2 * 2 * 16)
    assert (layer.conv_kernel_size, layer.chunk_size, layer.hidden_size) == (4, 16, 48)
    assert (layer.time_step_min, layer.time_step_max, layer.time_step_floor) == (0.001, 0.1, 1e-4)
    assert layer.time_step_limit == (0.01, 0.5)
    assert layer.use_conv_bias and layer.conv1d.bias.shape == (layer.conv_dim,)
    assert layer.in_proj.weight.shape == (2 * 60 + 2 * 2 * 16 + 6, 48)
    assert layer.out_proj.weight.shape == (48, 60)
    assert layer.norm.group_size == 30
    assert {"A_log", "D", "dt_bias"} <= set(dict(layer.named_parameters(recurse=False)))


BLOCK_TYPES = {
    "mamba": ["mamba", "linear_attention", "M"],
    "attention": ["attention", "full_attention", "*"],
    "mlp": ["mlp", "-"],
    "moe": ["moe", "E"],
}


@pytest.mark.parametrize(
    ("canonical", "spelling"), [(k, v) for k, values in BLOCK_TYPES.items() for v in values]
)
def test_block_types_in_all_spellings(canonical, spelling):
    block = NemotronV3Block(tiny_config(), 0, block_type=spelling)
    assert block.block_type == canonical
    assert block.layer_type == ("full_attention" if canonical == "attention" else canonical)
    assert block.self_attn is block.mixer
    assert block.mlp is (block.mixer if canonical == "moe" else None)


def test_a_block_reads_its_type_from_the_config():
    config = tiny_config()
    types = [NemotronV3Block(config, i).block_type for i in range(7)]
    assert types == list(config.layers_block_type)


def test_an_unknown_block_type_is_refused():
    with pytest.raises(ValueError, match="Invalid block_type 'conv'"):
        NemotronV3Block(tiny_config(), 0, block_type="conv")
    with pytest.raises(ValueError, match="layer_idx 7 is outside the model's 7 layers"):
        NemotronV3Block(tiny_config(), 7)


# --- foreign configs ----------------------------------------------------------------------------


def transformers_config() -> NemotronHConfig:
    ours = tiny_config()
    names = ["mamba", "moe", "attention", "mlp", "mamba", "attention", "moe"]
    skipped = ("hybrid_override_pattern", "layers_block_type", "num_hidden_layers")
    values = {k: v for k, v in ours.to_dict().items() if k not in skipped}
    return NemotronHConfig(layers_block_type=names, **values)


def plain_object() -> SimpleNamespace:
    ours = tiny_config()
    names = [
        "hidden_size",
        "num_attention_heads",
        "num_key_value_heads",
        "head_dim",
        "mamba_num_heads",
        "mamba_head_dim",
        "ssm_state_size",
        "n_groups",
        "conv_kernel",
        "chunk_size",
        "intermediate_size",
        "n_routed_experts",
        "num_experts_per_tok",
        "moe_intermediate_size",
        "vocab_size",
        "moe_shared_expert_intermediate_size",
        "routed_scaling_factor",
        "layers_block_type",
    ]
    return SimpleNamespace(**{name: getattr(ours, name) for name in names})


@pytest.mark.parametrize("make_config", [transformers_config, plain_object])
@pytest.mark.parametrize("block_type", BLOCK_TYPES)
def test_foreign_configs_build_the_same_layer_and_stay_as_they_are(make_config, block_type):
    config = make_config()
    before = dict(vars(config))
    theirs = NemotronV3Block(config, 0, block_type=block_type)
    assert vars(config) == before
    ours = NemotronV3Block(tiny_config(), 0, block_type=block_type)
    ours.load_state_dict(theirs.state_dict())
    x = torch.randn(2, 5, 48)
    assert torch.equal(ours(x), theirs(x))


def test_a_foreign_backend_is_read_and_a_missing_choice_named():
    foreign = SimpleNamespace(attn="sdpa", linear="torch", rms_norm="torch_fp32", experts="gmm")
    layer = NemotronV3Attention(tiny_config(), foreign)
    assert layer.backend is foreign and layer.chosen == BackendConfig()
    block = NemotronV3Block(tiny_config(), 0, backend=foreign, block_type="attention")
    assert block.mixer.backend is foreign and block.norm.backend == BackendConfig(rms_norm="torch")
    with pytest.raises(ValueError, match="flash"):
        NemotronV3Attention(tiny_config(), SimpleNamespace(attn="flash"))


def test_a_foreign_moe_config_decides_over_the_model_config():
    foreign = SimpleNamespace(
        dim=48, n_routed_experts=4, n_activated_experts=2, moe_inter_dim=16, route_scale=1.5,
        shared_expert_inter_dim=20, n_shared_experts=1, n_expert_groups=1, n_limited_groups=1,
        norm_topk_prob=True, expert_activation="relu2", score_func="sigmoid", train_gate=True,
    )  # fmt: skip
    block = NemotronV3Block(tiny_config(), 1, moe_config=foreign)
    same = MoEConfig(
        dim=48, n_routed_experts=4, n_activated_experts=2, moe_inter_dim=16, route_scale=1.5,
        shared_expert_inter_dim=20,
    )  # fmt: skip
    alone = NemotronV3MoE(same)
    alone.load_state_dict(block.mixer.state_dict())
    x = torch.randn(1, 6, 48)
    assert torch.equal(alone(x), block.mixer(x))


def test_a_moe_config_of_another_width_is_refused_and_a_frozen_gate_is_frozen():
    experts = {"n_routed_experts": 4, "n_activated_experts": 2, "moe_inter_dim": 16}
    other = MoEConfig(dim=32, shared_expert_inter_dim=20, **experts)
    with pytest.raises(ValueError, match="moe_config.dim is 32, the model's hidden_size 48"):
        NemotronV3Block(tiny_config(), 1, moe_config=other)
    frozen = MoEConfig(dim=48, shared_expert_inter_dim=20, train_gate=False, **experts)
    block = NemotronV3Block(tiny_config(), 1, moe_config=frozen)
    assert [n for n, p in block.named_parameters() if not p.requires_grad] == ["mixer.gate.weight"]


# --- errors -------------------------------------------------------------------------------------


@pytest.mark.parametrize("block_type", BLOCK_TYPES)
def test_bad_input_is_refused_with_its_value(block_type):
    block = NemotronV3Block(tiny_config(), 0, block_type=block_type)
    with pytest.raises(ValueError, match="32"):
        block(torch.randn(2, 5, 32))
    with pytest.raises(TypeError, match="'cu_seq_lens'"):
        block(torch.randn(2, 5, 48), cu_seq_lens=torch.tensor([0, 5]))
    with pytest.raises(TypeError, match="past_key_values is a object"):
        block(torch.randn(2, 5, 48), past_key_values=object())
    if block_type == "mlp":
        return
    with pytest.raises(ValueError, match=r"shape \(2, 4\), the tokens \(2, 5\)"):
        block(torch.randn(2, 5, 48), attention_mask=torch.ones(2, 4))
    if block_type == "moe":  # which works token by token
        return
    with pytest.raises(ValueError, match="ends at 4"):
        block(torch.randn(5, 48), cu_seqlens=torch.tensor([0, 2, 4]))
    with pytest.raises(ValueError, match="contradict"):
        block(
            torch.randn(5, 48),
            cu_seqlens=torch.tensor([0, 2, 5]),
            seq_idx=torch.tensor([0, 0, 0, 1, 1]),
        )


def test_sizes_that_contradict_each_other_are_refused():
    with pytest.raises(ValueError, match="group_size 7 does not divide hidden_size 60"):
        NemotronV3MambaRMSNormGated(60, 7)
    with pytest.raises(ValueError, match="n_groups 4"):
        tiny_config(n_groups=4)
    with pytest.raises(ValueError, match="num_key_value_heads 3"):
        tiny_config(num_key_value_heads=3)
    with pytest.raises(ValueError, match="only an attention layer takes a 4-D mask"):
        NemotronV3Mamba2Mixer(tiny_config(), 0)(
            torch.randn(1, 5, 48), attention_mask=torch.ones(1, 1, 5, 5)
        )
    with pytest.raises(ValueError, match="a 4-D mask is"):
        NemotronV3Attention(tiny_config())(
            torch.randn(1, 5, 48), attention_mask=torch.ones(1, 1, 5, 4, dtype=torch.bool)
        )


CONSTRUCTIONS = [
    (lambda c: NemotronV3Attention(c, 0), TypeError, "backend is 0: give a BackendConfig"),
    (lambda c: NemotronV3Attention(c, "flex"), TypeError, "backend is 'flex'"),
    (lambda c: NemotronV3Block(c, "0"), TypeError, "layer_idx is '0'"),
    (lambda c: NemotronV3Block(c, None), TypeError, "layer_idx is None"),
    (lambda c: NemotronV3MambaRMSNormGated(0, 1), ValueError, "hidden_size is 0: give at least"),
    (lambda c: NemotronV3MambaRMSNormGated(8, 2.0), TypeError, "group_size is 2.0"),
    (lambda c: NemotronV3MambaRMSNormGated(8, 0), ValueError, "group_size is 0"),
    (lambda c: NemotronV3MLP(0, 4), ValueError, "hidden_size is 0"),
    (lambda c: NemotronV3MLP(4, 4.5), TypeError, "intermediate_size is 4.5"),
    (lambda c: parameter_groups(3, 0.1), TypeError, "a int has no parameters"),
    (lambda c: report(3), TypeError, "a int holds no layers"),
]


@pytest.mark.parametrize(("build", "error", "message"), CONSTRUCTIONS)
def test_what_cannot_be_built_is_named(build, error, message):
    with pytest.raises(error, match=message):
        build(tiny_config())


@pytest.mark.parametrize("norm", [NemotronV3RMSNorm(8), NemotronV3MambaRMSNormGated(8, 2)])
def test_what_a_norm_does_not_take_is_named(norm):
    with pytest.raises(TypeError, match="hidden states are a list"):
        norm([1.0])
    with pytest.raises(TypeError, match="hidden states are torch.int64"):
        norm(torch.ones(2, 8, dtype=torch.int64))
    for shape in ((), (2, 7)):
        with pytest.raises(ValueError, match="8"):
            norm(torch.ones(shape))
