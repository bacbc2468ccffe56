"""Attention, MLP and mixture-of-experts layers beside the real ones, over random configs."""

import dataclasses

import pytest
import torch
from nemo_automodel.components.models.nemotron_v3.layers import NemotronV3Attention
from nemo_automodel.components.moe.config import MoEConfig
from nemo_automodel.components.moe.layers import MLP, MoE
from torch import Tensor

from tests.nemo.models import their_backend, their_config
from tests.nemo.rule import ByTheRule

CHUNKS, EACH = 2, 100  # of configs: 200 for each kind of layer


def pick(generator: torch.Generator, *values):
    return values[int(torch.randint(len(values), (), generator=generator))]


def masks(kind: str, B: int, S: int, H: int, generator: torch.Generator) -> Tensor | None:
    """Masks of every shape that theirs takes; each token sees itself, so that no softmax is of
    nothing."""
    if kind == "none":
        return None
    if kind in ("left", "right"):
        mask = torch.ones(B, S, dtype=torch.int64)
        for row in range(B):
            padded = int(torch.randint(0, S, (), generator=generator))
            mask[row, : padded if kind == "left" else 0] = 0
            mask[row, S - padded if kind == "right" else S :] = 0
        return mask
    rows, heads = (B, 1) if kind.startswith("row") else (1, H)
    seen = torch.rand(rows, heads, S, S, generator=generator) < 0.6
    seen = (seen | torch.eye(S, dtype=torch.bool)).tril()
    if kind.endswith("bool"):
        return seen
    return torch.zeros(seen.shape).masked_fill(~seen, float("-inf"))


@pytest.mark.parametrize("chunk", range(CHUNKS))
def test_attention(chunk):
    rule = ByTheRule()
    for seed in range(chunk * EACH, (chunk + 1) * EACH):
        generator = torch.Generator().manual_seed(seed)
        kv_heads = pick(generator, 1, 2, 3)
        heads = kv_heads * pick(generator, 1, 2, 4)
        config = their_config(
            num_attention_heads=heads,
            num_key_value_heads=kv_heads,
            head_dim=pick(generator, 4, 8, 20),
            hidden_size=pick(generator, 16, 48),
            attention_bias=pick(generator, True, False),
        )
        torch.manual_seed(seed)
        layer = NemotronV3Attention(config, their_backend())
        B, S = pick(generator, 1, 2, 3), pick(generator, 1, 5, 12)
        kinds = ("none", "left", "right", "row bool", "row add", "head bool", "head add")
        mask = masks(pick(generator, *kinds), B, S, heads, generator)
        # What is read at padding is nobody's business: theirs attends there, ours gives 0.
        real = mask[..., None] if mask is not None and mask.dim() == 2 else 1

        def call(layer, x, mask=mask, real=real):
            return layer(x, attention_mask=mask) * real

        rule.add(layer, torch.empty(B, S, config.hidden_size), call, seed)
    rule.check()


@pytest.mark.parametrize("chunk", range(CHUNKS))
def test_mlp(chunk):
    rule = ByTheRule()
    for seed in range(chunk * EACH, (chunk + 1) * EACH):
        generator = torch.Generator().manual_seed(seed)
        torch.manual_seed(seed)
        D, F = pick(generator, 8, 48), pick(generator, 4, 40)
        options = {"dtype": torch.float32, "activation": "relu2"}
        layer = MLP(D, F, "torch", bias=pick(generator, True, False), **options)
        shape = pick(generator, (3, D), (2, 5, D), (1, 1, D))
        rule.add(layer, torch.empty(shape), lambda layer, x: layer(x), seed)
    rule.check()


def moe_config(generator: torch.Generator) -> MoEConfig:
    """Random, without what theirs gets wrong (one choice that is normalised), and with a bias that
    is never negative, where dropped groups cannot win."""
    groups = pick(generator, 1, 1, 2, 4)
    experts = groups * pick(generator, 2, 4)
    kept = pick(generator, *range(1, groups + 1))
    most = experts // groups * kept
    fields = {
        "n_routed_experts": experts,
        "n_shared_experts": pick(generator, 0, 1, 2),
        "n_activated_experts": pick(generator, *range(2, most + 1)),
        "n_expert_groups": groups,
        "n_limited_groups": kept,
        "train_gate": True,
        "gate_bias_update_factor": 0.0,
        "aux_loss_coeff": 0.0,
        "score_func": "sigmoid",
        "route_scale": pick(generator, 1.0, 2.5),
        "dim": pick(generator, 16, 48),
        "inter_dim": 40,
        "moe_inter_dim": pick(generator, 8, 24),
        "norm_topk_prob": pick(generator, True, False),
        "expert_activation": "relu2",
        "dtype": torch.float32,
        "shared_expert_inter_dim": pick(generator, None, 32),
        "shared_expert_activation": "relu2",
        "force_e_score_correction_bias": True,
        "moe_latent_size": pick(generator, None, 12),
        "apply_router_weight_after_down": pick(generator, True, False),
        "router_weights_fp32": pick(generator, True, False),
    }
    known = {field.name for field in dataclasses.fields(MoEConfig)}  # of this version
    return MoEConfig(**{name: value for name, value in fields.items() if name in known})


@pytest.mark.parametrize("chunk", range(CHUNKS))
def test_mixture_of_experts(chunk):
    rule = ByTheRule()
    for seed in range(chunk * EACH, (chunk + 1) * EACH):
        generator = torch.Generator().manual_seed(seed)
        torch.manual_seed(seed)
        config = moe_config(generator)
        backend = their_backend(
            gate_precision="float32", experts=pick(generator, "torch", "torch_mm")
        )
        layer = MoE(config, backend)
        with torch.no_grad():
            layer.init_weights(torch.device("cpu"), init_std=0.3)
        # Between two choices that score nearly alike, rounding decides: not with scores so far
        # apart, and never below 0.
        layer.gate.e_score_correction_bias.uniform_(0.5, 4.0, generator=generator)
        shape = (pick(generator, 1, 2), pick(generator, 1, 6, 11), config.dim)
        rule.add(layer, torch.empty(shape), lambda layer, x: layer(x), seed)
    rule.check()
