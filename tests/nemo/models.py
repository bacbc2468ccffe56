"""Tiny models of NeMo AutoModel that the tests of `nemotron_v3.nemo` share."""

from pathlib import Path
from typing import Any

import torch
from nemo_automodel.components.models.common import BackendConfig
from nemo_automodel.components.models.nemotron_v3 import layers
from nemo_automodel.components.models.nemotron_v3.model import NemotronHForCausalLM
from safetensors.torch import save_file
from torch import nn
from transformers import NemotronHConfig

from tests.models import disturb

ALL_BLOCKS = ("mamba", "moe", "attention", "mlp", "mamba", "attention", "moe")
CPU = torch.device("cpu")
# Where a mixer has its three fp32 tensors: version 0.5 has no holder for them.
HOLDER = "_fp32_params." if hasattr(layers, "NemotronV3MambaFP32Params") else ""
BACKEND = {
    "attn": "sdpa",
    "linear": "torch",
    "rms_norm": "torch_fp32",
    "experts": "torch",
    "dispatcher": "torch",
    "rope_fusion": False,
}


def their_config(blocks: tuple[str, ...] = ALL_BLOCKS, **changes: Any) -> NemotronHConfig:
    """transformers' config, which AutoModel builds its model from."""
    sizes = {
        "vocab_size": 97,
        "hidden_size": 48,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "head_dim": 20,
        "mamba_num_heads": 6,
        "mamba_head_dim": 10,
        "ssm_state_size": 16,
        "n_groups": 2,
        "conv_kernel": 4,
        "chunk_size": 16,
        "intermediate_size": 40,
        "n_routed_experts": 8,
        "num_experts_per_tok": 3,
        "moe_intermediate_size": 24,
        "moe_shared_expert_intermediate_size": 32,
        "routed_scaling_factor": 2.5,
        "n_group": 1,
        "topk_group": 1,
        "norm_topk_prob": True,
        "mlp_hidden_act": "relu2",
        "mamba_hidden_act": "silu",
        "use_mamba_kernels": False,
        "tie_word_embeddings": False,
        "pad_token_id": 0,
        "bos_token_id": 1,
        "eos_token_id": 2,
        "torch_dtype": "float32",
    }
    return NemotronHConfig(layers_block_type=list(blocks), **(sizes | changes))


def their_backend(**changes: Any) -> BackendConfig:
    return BackendConfig(**(BACKEND | changes))


def their_model(
    blocks: tuple[str, ...] = ALL_BLOCKS,
    *,
    seed: int = 0,
    dtype: torch.dtype = torch.float32,
    backend: BackendConfig | None = None,
    **changes: Any,
) -> NemotronHForCausalLM:
    """A tiny model whose every parameter matters, on a CPU."""
    torch.manual_seed(seed)
    model = NemotronHForCausalLM(their_config(blocks, **changes), backend or their_backend())
    model.initialize_weights(buffer_device=CPU, dtype=dtype)
    disturb(model, torch.Generator().manual_seed(seed))
    return model


def tensors(model: nn.Module) -> dict[str, torch.Tensor]:
    return {name: tensor.detach().clone() for name, tensor in model.state_dict().items()}


def saved(model: NemotronHForCausalLM, folder: Path) -> Path:
    """The folder with what AutoModel's own adapter makes of the weights, and the config."""
    state = model.state_dict_adapter.to_hf(dict(model.state_dict()))
    save_file({k: v.contiguous() for k, v in state.items()}, folder / "model.safetensors")
    model.config.architectures = ["NemotronHForCausalLM"]
    model.config.save_pretrained(folder)
    return folder
