"""The config.json files of five released models, rebuilt from their values.

Together they hold every spelling a reader meets: a pattern or a list of blocks, with and without
their number, both names of the head width, of the norm's epsilon and of the dtype, infinity as a
bare token and as 1e308, two indentations, with and without a newline at the end.
"""

import functools
import json
import math
import tempfile
from pathlib import Path

from nemotron_v3.config import PATTERN


def words(pattern: str) -> list[str]:
    return [PATTERN[letter] for letter in pattern]


REMOTE = "configuration_nemotron_h.NemotronHConfig", "modeling_nemotron_h.NemotronHForCausalLM"
AUTO_MAP = dict(zip(("AutoConfig", "AutoModelForCausalLM"), REMOTE, strict=True))

COMMON = {
    "architectures": ["NemotronHForCausalLM"],
    "attention_bias": False,
    "attention_dropout": 0.0,
    "bos_token_id": 1,
    "chunk_size": 128,
    "conv_kernel": 4,
    "eos_token_id": 2,
    "expand": 2,
    "hidden_dropout": 0.0,
    "initializer_range": 0.02,
    "layer_norm_epsilon": 1e-05,
    "mamba_head_dim": 64,
    "mamba_hidden_act": "silu",
    "mamba_proj_bias": False,
    "mlp_bias": False,
    "mlp_hidden_act": "relu2",
    "model_type": "nemotron_h",
    "n_groups": 8,
    "num_logits_to_keep": 1,
    "pad_token_id": 0,
    "rescale_prenorm_residual": True,
    "residual_in_fp32": False,
    "sliding_window": None,
    "tie_word_embeddings": False,
    "time_step_floor": 0.0001,
    "time_step_max": 0.1,
    "time_step_min": 0.001,
    "use_bias": False,
    "use_cache": True,
    "use_conv_bias": True,
    "use_mamba_kernels": True,
    "vocab_size": 131072,
}

MOE = {
    "head_dim": 128,
    "mamba_ssm_cache_dtype": "float32",
    "n_group": 1,
    "n_shared_experts": 1,
    "norm_eps": 1e-05,
    "norm_topk_prob": True,
    "num_key_value_heads": 2,
    "partial_rotary_factor": 1.0,
    "rope_theta": 10000,
    "ssm_state_size": 128,
    "topk_group": 1,
}

# Name -> (values, indentation, end of the file).
FILES = {
    "NVIDIA-Nemotron-3-Nano-30B-A3B-BF16": (
        COMMON
        | MOE
        | {
            "auto_map": AUTO_MAP | {"AutoModel": REMOTE[1]},
            "hidden_size": 2688,
            "hybrid_override_pattern": "MEMEM*EMEMEM*EMEMEM*EMEMEM*EMEMEM*EMEMEMEM*EMEMEMEME",
            "intermediate_size": 1856,
            "mamba_num_heads": 64,
            "max_position_embeddings": 262144,
            "moe_intermediate_size": 1856,
            "moe_shared_expert_intermediate_size": 3712,
            "n_routed_experts": 128,
            "num_attention_heads": 32,
            "num_experts_per_tok": 6,
            "num_hidden_layers": 52,
            "routed_scaling_factor": 2.5,
            "torch_dtype": "bfloat16",
            "transformers_version": "4.53.2",
        },
        4,
        "",
    ),
    "NVIDIA-Nemotron-3-Super-120B-A12B-FP8": (
        COMMON
        | MOE
        | {
            "auto_map": AUTO_MAP,
            "dtype": "bfloat16",
            "hidden_size": 4096,
            "hybrid_override_pattern": (
                "MEMEMEM*EMEMEMEM*EMEMEMEM*EMEMEMEMEM*EMEMEMEMEM*EMEMEMEMEM*E"
                "MEMEMEMEM*EMEMEMEM*EMEMEMEME"
            ),
            "intermediate_size": 2688,
            "mamba_num_heads": 128,
            "max_position_embeddings": 262144,
            "moe_intermediate_size": 2688,
            "moe_latent_size": 1024,
            "moe_shared_expert_intermediate_size": 5376,
            "moe_shared_expert_overlap": False,
            "mtp_hybrid_override_pattern": "*E",
            "n_routed_experts": 512,
            "num_attention_heads": 32,
            "num_experts_per_tok": 22,
            "num_hidden_layers": 88,
            "num_nextn_predict_layers": 1,
            "routed_scaling_factor": 5.0,
            "time_step_limit": [0.0, math.inf],
            "transformers_version": "4.57.1",
        },
        4,
        "\n",
    ),
    "NVIDIA-Nemotron-3-Ultra-550B-A55B-BF16": (
        COMMON
        | MOE
        | {
            "auto_map": AUTO_MAP,
            "dtype": "bfloat16",
            "hidden_size": 8192,
            "intermediate_size": 5120,
            "layers_block_type": words(
                "MEMEMEM*EMEMEM*EMEMEMEM*EMEMEMEM*EMEMEM*EMEMEMEM*EMEMEMEM*EM"
                "EMEM*EMEMEMEM*EMEMEMEM*EMEMEM*EMEMEMEM*EMEMEMEME"
            ),
            "mamba_num_heads": 256,
            "max_position_embeddings": 262144,
            "moe_intermediate_size": 5120,
            "moe_latent_size": 2048,
            "moe_shared_expert_intermediate_size": 10240,
            "moe_shared_expert_overlap": False,
            "mtp_layers_block_type": ["attention", "moe"],
            "n_routed_experts": 512,
            "num_attention_heads": 64,
            "num_experts_per_tok": 22,
            "num_nextn_predict_layers": 1,
            "routed_scaling_factor": 5.0,
            "time_step_limit": [0.0, 1e308],
            "transformers_version": "4.57.6",
        },
        2,
        "\n",
    ),
    "NVIDIA-Nemotron-3.5-Lightning-30B-A3B-NVFP4": (
        COMMON
        | MOE
        | {
            "dtype": "bfloat16",
            "hidden_size": 2688,
            "intermediate_size": 1856,
            "layers_block_type": words("MEMEM*EMEMEM*EMEMEM*EMEMEM*EMEMEM*EMEMEMEM*EMEMEMEME"),
            "mamba_num_heads": 64,
            "max_position_embeddings": 1048576,
            "moe_intermediate_size": 1856,
            "moe_latent_size": None,
            "moe_shared_expert_intermediate_size": 3712,
            "moe_shared_expert_overlap": True,
            "mtp_layers_block_type": ["attention", "moe"],
            "n_routed_experts": 128,
            "num_attention_heads": 32,
            "num_experts_per_tok": 6,
            "num_hidden_layers": 52,
            "num_nextn_predict_layers": 1,
            "routed_scaling_factor": 2.5,
            "transformers_version": "5.8.1",
        },
        4,
        "",
    ),
    "Nemotron-H-56B-Base-8K": (
        COMMON
        | {
            "attention_head_dim": 128,
            "auto_map": AUTO_MAP,
            "hidden_size": 8192,
            "hybrid_override_pattern": (
                "M-M-M-M*-M-M-M-M-M*-M-M-M-M-M*-M-M-M-M-M*-M-M-M-M-M*-M-M-M-M"
                "-M*-M-M-M-M-M*-M-M-M-M-M*-M-M-M-M-M*-M-M-M-M-M*-M-M-M-M-M-"
            ),
            "intermediate_size": 32768,
            "mamba_num_heads": 256,
            "max_position_embeddings": 8192,
            "num_attention_heads": 64,
            "num_hidden_layers": 118,
            "num_key_value_heads": 8,
            "rms_norm_eps": 1e-05,
            "ssm_state_size": 256,
            "time_step_limit": [0.0, math.inf],
            "time_step_rank": 512,
            "torch_dtype": "bfloat16",
            "transformers_version": "4.48.0.dev0",
        },
        4,
        "",
    ),
}


@functools.cache
def folder() -> Path:
    """A directory that holds the files as NAME.json, written once a process."""
    path = Path(tempfile.mkdtemp(prefix="released-"))
    for name, (values, indent, end) in FILES.items():
        text = json.dumps(values, indent=indent, sort_keys=True).replace("1e+308", "1e308")
        (path / f"{name}.json").write_text(text + end)
    return path


def paths() -> list[Path]:
    return sorted(folder().glob("*.json"))
