# pyright: reportUnnecessaryTypeIgnoreComment=true
"""What a type checker sees of the public names: read by `make lint`, never run.

A line that a checker must refuse is ignored by the rule that refuses it, and an ignore that
nothing needs is an error here.
"""

from typing import assert_type

import torch

from nemotron_v3 import BackendConfig, MoEConfig, NemotronV3Config


def use_configs() -> None:
    config = NemotronV3Config(layers_block_type="ME", dtype="bfloat16", num_key_value_heads=None)
    assert_type(config.layers_block_type, tuple[str, ...])
    assert_type(config.num_hidden_layers, int)
    assert_type(config.hybrid_override_pattern, str)
    assert_type(config.num_key_value_heads, int)
    assert_type(config.dtype, torch.dtype | None)
    assert_type(NemotronV3Config.preset("nemotron-h-8b", dtype=None), NemotronV3Config)
    NemotronV3Config(hybrid_override_pattern="ME", num_hidden_layers=2)
    NemotronV3Config(layers_block_type=3)  # pyright: ignore[reportArgumentType]
    NemotronV3Config(layer_block_types="ME")  # pyright: ignore[reportCallIssue]
    config.hidden_size = 3  # pyright: ignore[reportAttributeAccessIssue]
    moe = MoEConfig(dim=8, n_routed_experts=4, n_activated_experts=2, moe_inter_dim=8)
    assert_type(moe.shared_expert_inter_dim, int)
    MoEConfig(dim=8)  # pyright: ignore[reportCallIssue]
    BackendConfig(attn="sdpa", impl="auto")
