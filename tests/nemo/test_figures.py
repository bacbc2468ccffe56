"""The figures of docs/nemo.md: how far AutoModel's numbers are from the truth, and ours.

The truth is this package's reference in fp64 on the same weights. Where theirs needs CUDA kernels,
its formulas are computed by the accelerated layer, called with what its code hands to them.
"""

import copy
import re
from pathlib import Path

import pytest
import torch
from nemo_automodel.components.models.nemotron_v3.cache import NemotronHybridCache
from nemo_automodel.components.models.nemotron_v3.layers import (
    NemotronV3Attention,
    NemotronV3Mamba2Mixer,
)
from nemo_automodel.components.moe.layers import MoE
from torch import Tensor, nn

from nemotron_v3.nemo import accelerate
from tests.nemo.models import CPU, their_backend, their_config
from tests.nemo.test_documented_classes import MOE, MoEConfig

PAGE = Path(__file__).parents[2] / "docs" / "nemo.md"
B, S, D = 2, 24, 48


def off(found: Tensor, truth: Tensor) -> float:
    """The relative error, in the Frobenius norm."""
    return float((found.double() - truth.double()).norm() / truth.double().norm())


def exact(layer: nn.Module) -> nn.Module:
    return accelerate(copy.deepcopy(layer).double(), impl="reference")


def mixer(**changes) -> NemotronV3Mamba2Mixer:
    torch.manual_seed(0)
    config = their_config(**changes)
    config.use_bias = True
    layer = NemotronV3Mamba2Mixer(config, layer_idx=0)
    # The scan's part of the output about as large as that of the skip, as in a trained layer.
    layer.dt_bias.data.uniform_(-4.0, 0.0)
    layer.D.data.fill_(0.1)
    layer.in_proj.weight.data.mul_(4.0)
    layer.in_proj.bias.data.mul_(4.0)
    return layer


def left_padding() -> tuple[float, float]:
    """Theirs zeroes padding before the projection, whose bias and the convolution's run in."""
    layer = mixer()
    x, n = torch.randn(1, S, D), S // 2
    mask = torch.ones(1, S)
    mask[:, :n] = 0
    truth = exact(layer)(x[:, n:].double())
    ours = accelerate(layer)
    return off(ours(x * mask[..., None])[:, n:], truth), off(ours(x, mask)[:, n:], truth)


def steps_of(layer: nn.Module, x: Tensor, cuts: list[int]) -> Tensor:
    cache, parts = NemotronHybridCache(their_config(), B, x.dtype, CPU), []
    for start, end in zip(cuts[:-1], cuts[1:], strict=True):
        parts.append(layer(x[:, start:end], past_key_values=cache))
        cache.has_previous_state = True
    return torch.cat(parts, 1)


def step_limits() -> tuple[float, float]:
    """Theirs hands no limits to the step of one token."""
    layer, x = mixer(time_step_limit=(0.01, 0.1)), torch.randn(B, S, D)
    truth = exact(layer)(x.double())
    ours, forgetful = accelerate(layer), copy.deepcopy(layer)
    forgetful.time_step_limit = (0.0, float("inf"))
    each = list(range(S + 1))
    return off(steps_of(forgetful, x, each), truth), off(steps_of(ours, x, each), truth)


def second_piece() -> tuple[float, float]:
    """Theirs scans it from a fresh state."""
    layer, x, cut = mixer(), torch.randn(B, S, D), S // 2
    truth = exact(layer)(x.double())[:, cut:]
    ours = accelerate(layer)
    return off(ours(x[:, cut:]), truth), off(steps_of(ours, x, [0, cut, S])[:, cut:], truth)


def attention() -> NemotronV3Attention:
    torch.manual_seed(0)
    layer = NemotronV3Attention(their_config(), their_backend())
    for parameter in layer.parameters():
        parameter.data.mul_(4.0)
    return layer


def documents() -> tuple[float, float]:
    layer, x = attention(), torch.randn(1, S, D)
    told = {"cu_seqlens": torch.tensor([0, 5, 14, S])}
    truth = exact(layer)(x.double(), **told)
    return off(layer(x, **told), truth), off(accelerate(layer)(x, **told), truth)


def second_piece_of_attention() -> tuple[float, float]:
    layer, x, cut = attention(), torch.randn(B, S, D), S // 2
    truth = exact(layer)(x.double())[:, cut:]

    def run(layer: nn.Module) -> Tensor:
        cache = NemotronHybridCache(their_config(), B, x.dtype, CPU)
        layer(x[:, :cut], past_key_values=cache, layer_idx=2)
        cache.has_previous_state = True
        return layer(x[:, cut:], past_key_values=cache, layer_idx=2)

    return off(run(layer), truth), off(run(accelerate(copy.deepcopy(layer))), truth)


def padding_under_a_causal_mask() -> tuple[float, float]:
    """`generate` hands attention a causal mask that is blind to padding."""
    layer, x, n = attention(), torch.randn(1, S, D), S // 2
    truth = exact(layer)(x[:, n:].double())
    causal = torch.zeros(1, 1, S, S).masked_fill(~torch.ones(S, S).tril().bool(), float("-inf"))
    mask = torch.ones(1, S)
    mask[:, :n] = 0
    theirs = layer(x, attention_mask=causal)[:, n:]
    return off(theirs, truth), off(accelerate(layer)(x, attention_mask=mask)[:, n:], truth)


def mixture(bias: float, **changes) -> tuple[float, float]:
    torch.manual_seed(0)
    layer = MoE(MoEConfig(**(MOE | changes)), their_backend(gate_precision="float32"))
    with torch.no_grad():
        layer.init_weights(CPU, init_std=0.3)
        layer.gate.e_score_correction_bias.fill_(bias)
    x = torch.randn(B, S, D)
    truth = exact(layer)(x.double())
    return off(layer(x), truth), off(accelerate(layer)(x), truth)


def negative_scores() -> tuple[float, float]:
    return mixture(-3.0)


def one_choice() -> tuple[float, float]:
    return mixture(0.0, n_activated_experts=1, n_expert_groups=1, n_limited_groups=1)


CASES = {
    "left padding in a mamba layer with biases": left_padding,
    "left-padded `generate`, in attention": padding_under_a_causal_mask,
    "packed documents (`cu_seqlens`) in `sdpa` attention": documents,
    "decoding with `time_step_limit`": step_limits,
    "a second piece of several tokens on a cache, in a mamba layer": second_piece,
    "the same in attention": second_piece_of_attention,
    "groups of experts, biased scores below 0": negative_scores,
    "`top_k = 1` with `norm_topk_prob`": one_choice,
}


@torch.no_grad()
@pytest.mark.parametrize("case", CASES)
def test_the_page_says_what_is_measured(case):
    theirs, ours = CASES[case]()
    row = re.search(
        rf"^\| {re.escape(case)} \| ([\d.]+) % \| ([\d.e-]+) \|", PAGE.read_text(), re.M
    )
    assert row is not None, f"| {case} | {100 * theirs:.0f} % | {ours:.0e} |"
    assert abs(100 * theirs - float(row[1])) <= 2.0, theirs
    assert ours <= 1e-6 and float(row[2]) <= 1e-6
