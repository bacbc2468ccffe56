"""The initial distribution, once and twice."""

import math

import pytest
import torch
from torch import nn

from nemotron_v3 import NemotronV3ForCausalLM
from nemotron_v3.layers import NemotronV3Block
from tests.models import tiny_config

WIDE = {"hidden_size": 256, "mamba_num_heads": 64, "intermediate_size": 256, "vocab_size": 1000}


def block(block_type: str, **changes) -> NemotronV3Block:
    return NemotronV3Block(tiny_config(**(WIDE | changes)), 0, block_type=block_type)


def spread(weight: torch.Tensor) -> float:
    return float(weight.detach().square().mean().sqrt())


@pytest.mark.parametrize("calls", [0, 1, 2])
@pytest.mark.parametrize(
    ("block_type", "plain", "into_stream"),
    [
        ("mamba", "in_proj", "out_proj"),
        ("attention", "q_proj", "o_proj"),
        ("mlp", "up_proj", "down_proj"),
        ("moe", "experts.up_proj", "experts.down_proj"),
        ("moe", "shared_experts.up_proj", "shared_experts.down_proj"),
    ],
)
def test_spreads_however_often_it_is_called(block_type, plain, into_stream, calls):
    mixer = block(block_type).mixer
    for _ in range(calls):
        mixer.init_weights(num_hidden_layers=7)
    weights = {name.removesuffix(".weight"): p for name, p in mixer.named_parameters()}
    count = min(weights[plain].numel(), weights[into_stream].numel())
    within = 5 / math.sqrt(2 * count)  # five standard errors of a standard deviation
    assert spread(weights[plain]) == pytest.approx(0.02, rel=within)
    assert spread(weights[into_stream]) == pytest.approx(0.02 / math.sqrt(7), rel=within)


def test_without_rescaling_the_output_projection_is_like_the_others():
    mixer = block("mlp").mixer
    mixer.init_weights(num_hidden_layers=7, rescale_prenorm_residual=False)
    assert spread(mixer.down_proj.weight) == pytest.approx(0.02, rel=0.05)


def test_the_mambas_own_parameters():
    mixer = block("mamba", time_step_min=0.001, time_step_max=0.1, time_step_floor=0.02).mixer
    assert torch.equal(mixer.A_log, torch.arange(1, 65).log())
    assert torch.equal(mixer.D, torch.ones(64)) and torch.equal(mixer.norm.weight, torch.ones(640))
    dt = nn.functional.softplus(mixer.dt_bias.detach())
    assert dt.min() >= 0.02 * (1 - 1e-5) and dt.max() <= 0.1 * (1 + 1e-5)
    assert (dt < 0.0201).any() and (dt > 0.05).any()  # some at the floor, some well above
    bound = 1 / math.sqrt(mixer.conv_kernel_size)
    assert 0.95 * bound < mixer.conv1d.weight.abs().max() <= bound
    assert torch.count_nonzero(mixer.conv1d.bias) == 0


@pytest.mark.parametrize("block_type", ["mamba", "attention", "mlp", "moe"])
def test_a_block_built_on_meta_is_drawn_on_the_cpu(block_type):
    with torch.device("meta"):
        made = block(block_type, use_bias=True, mlp_bias=True, attention_bias=True)
    assert all(p.is_meta for p in made.parameters())
    made.init_weights()
    assert all(p.device.type == "cpu" and p.isfinite().all() for p in made.parameters())
    for name, tensor in [*made.named_parameters(), *made.named_buffers()]:
        if name.endswith("bias") and not name.endswith("dt_bias"):
            assert torch.count_nonzero(tensor) == 0, name


def test_a_model_built_on_meta_is_drawn_like_one_that_was_not():
    with torch.device("meta"):
        model = NemotronV3ForCausalLM(tiny_config(**WIDE))
    model.init_weights()
    assert spread(model.model.embeddings.weight) == pytest.approx(0.02, rel=0.02)
    assert spread(model.lm_head.weight) == pytest.approx(0.02, rel=0.02)
    assert model.model.layers[0].mixer.A_log.dtype == torch.float32
