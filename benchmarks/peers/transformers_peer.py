"""transformers' NemotronH, with its fastest settings on a CPU."""

from typing import Any

import torch
import transformers
from torch import nn
from transformers import NemotronHConfig, NemotronHForCausalLM

NAME = f"transformers {transformers.__version__}"

transformers.logging.set_verbosity_error()


def causal_lm(sizes: dict[str, Any]) -> nn.Module:
    """A fresh model in fp32.

    Its steps are clamped at `time_step_min`, ours at `time_step_limit`, as the released models
    have it: the peer's floor is put where it does nothing.
    """
    config = NemotronHConfig(**sizes, time_step_min=1e-9, use_cache=False)
    # The alternatives, eager attention and one matrix product an expert, are slower.
    return NemotronHForCausalLM._from_config(
        config, dtype=torch.float32, attn_implementation="sdpa", experts_implementation="grouped_mm"
    )


def moe_block(**sizes: Any) -> nn.Module:
    """A fresh mixture-of-experts block in bf16, its experts by grouped products."""
    config = NemotronHConfig(
        layers_block_type=["moe"],
        vocab_size=32,
        n_group=1,
        topk_group=1,
        norm_topk_prob=True,
        use_cache=False,
        **sizes,
    )
    model = NemotronHForCausalLM._from_config(
        config, dtype=torch.bfloat16, experts_implementation="grouped_mm"
    )
    return model.model.layers[0].mixer
