"""The released models as data: what each differs in from the defaults of `NemotronV3Config`.

Values are those of the models' config.json files (56B and the four MoE models) and of the published
training recipes of the same models (the others).
"""

import re
from typing import Any

from nemotron_v3.config.spelling import closest


def _released(**values: Any) -> dict[str, Any]:
    return {"vocab_size": 131072, "dtype": "bfloat16", **values}


def _nano_30b(**values: Any) -> dict[str, Any]:
    return _released(
        layers_block_type="MEMEM*EMEMEM*EMEMEM*EMEMEM*EMEMEM*EMEMEMEM*EMEMEMEME",
        hidden_size=2688,
        num_key_value_heads=2,
        mamba_num_heads=64,
        intermediate_size=1856,
        n_routed_experts=128,
        num_experts_per_tok=6,
        moe_intermediate_size=1856,
        moe_shared_expert_intermediate_size=3712,
        routed_scaling_factor=2.5,
        **values,
    )


_VALUES: dict[str, dict[str, Any]] = {
    "nemotron-h-4b": _released(
        layers_block_type="M-M-M-M*-M-M-M-M-M*-M-M-M-M-M*-M-M-M-M-M*-M-M-M-M-M-",
        hidden_size=3072,
        mamba_num_heads=112,
        intermediate_size=12288,
        max_position_embeddings=8192,
    ),
    "nemotron-h-8b": _released(
        layers_block_type="M-M-M-M*-M-M-M-M-M*-M-M-M-M-M*-M-M-M-M-M*-M-M-M-M-M-",
        hidden_size=4096,
        intermediate_size=21504,
        max_position_embeddings=8192,
    ),
    "nemotron-h-47b": _released(
        layers_block_type=(
            "M-M-M-M-M-M-M-M-M*-M-M-M-M-M-M-M-M-M-M*-M-M-M-M-M*-M-M-M-M-M*-"
            "M-M-M-M-M-M-M---MM---M-M*-M-M-M-M-M-"
        ),
        hidden_size=8192,
        num_attention_heads=64,
        mamba_num_heads=256,
        ssm_state_size=256,
        intermediate_size=30720,
        max_position_embeddings=8192,
    ),
    "nemotron-h-56b": _released(
        layers_block_type=(
            "M-M-M-M*-M-M-M-M-M*-M-M-M-M-M*-M-M-M-M-M*-M-M-M-M-M*-M-M-M-M-M*-"
            "M-M-M-M-M*-M-M-M-M-M*-M-M-M-M-M*-M-M-M-M-M*-M-M-M-M-M-"
        ),
        hidden_size=8192,
        num_attention_heads=64,
        mamba_num_heads=256,
        ssm_state_size=256,
        intermediate_size=32768,
        max_position_embeddings=8192,
    ),
    "nemotron-nano-9b-v2": _released(
        layers_block_type="M-M-M-MM-M-M-M*-M-M-M*-M-M-M-M*-M-M-M-M*-M-MM-M-M-M-M-M-",
        hidden_size=4480,
        num_attention_heads=40,
        mamba_head_dim=80,
        intermediate_size=15680,
        max_position_embeddings=131072,
    ),
    "nemotron-nano-12b-v2": _released(
        layers_block_type="M-M-M-M*-M-M-M-M*-M-M-M-M*-M-M-M-M*-M-M-M-M*-M-M-M-M*-M-M-M-M-",
        hidden_size=5120,
        num_attention_heads=40,
        mamba_head_dim=80,
        intermediate_size=20480,
        max_position_embeddings=131072,
    ),
    "nemotron-3-nano-4b": _released(
        layers_block_type="M-M-M-MM-M-M*-M-M*-M-M-M*-M-M-MM*-MMM-M-M-",
        hidden_size=3136,
        num_attention_heads=40,
        mamba_num_heads=96,
        mamba_head_dim=80,
        chunk_size=256,
        intermediate_size=12544,
        max_position_embeddings=262144,
    ),
    "nemotron-3-nano-30b": _nano_30b(max_position_embeddings=262144),
    "nemotron-3-super": _released(
        layers_block_type=(
            "MEMEMEM*EMEMEMEM*EMEMEMEM*EMEMEMEMEM*EMEMEMEMEM*"
            "EMEMEMEMEM*EMEMEMEMEM*EMEMEMEM*EMEMEMEME"
        ),
        hidden_size=4096,
        num_key_value_heads=2,
        intermediate_size=2688,
        n_routed_experts=512,
        num_experts_per_tok=22,
        moe_intermediate_size=2688,
        moe_shared_expert_intermediate_size=5376,
        moe_latent_size=1024,
        moe_shared_expert_overlap=False,
        routed_scaling_factor=5.0,
        num_nextn_predict_layers=1,
        max_position_embeddings=262144,
    ),
    "nemotron-3-ultra": _released(
        layers_block_type=(
            "MEMEMEM*EMEMEM*EMEMEMEM*EMEMEMEM*EMEMEM*EMEMEMEM*EMEMEMEM*"
            "EMEMEM*EMEMEMEM*EMEMEMEM*EMEMEM*EMEMEMEM*EMEMEMEME"
        ),
        hidden_size=8192,
        num_attention_heads=64,
        num_key_value_heads=2,
        mamba_num_heads=256,
        intermediate_size=5120,
        n_routed_experts=512,
        num_experts_per_tok=22,
        moe_intermediate_size=5120,
        moe_shared_expert_intermediate_size=10240,
        moe_latent_size=2048,
        moe_shared_expert_overlap=False,
        routed_scaling_factor=5.0,
        num_nextn_predict_layers=1,
        max_position_embeddings=262144,
    ),
    "nemotron-3.5-lightning": _nano_30b(
        num_nextn_predict_layers=1,
        max_position_embeddings=1048576,
    ),
}

PRESETS: tuple[str, ...] = tuple(_VALUES)


def preset_values(name: str) -> dict[str, Any]:
    """The settings of the released model `name`; raises `ValueError` naming the nearest one."""
    if name in _VALUES:
        return dict(_VALUES[name])
    nearest = closest(str(name), PRESETS, cutoff=0.0)[0]
    raise ValueError(
        f"unknown preset {name!r}: did you mean {nearest!r}? The presets are {', '.join(PRESETS)}"
    )


# What a model id on the hub says beside the preset's name: who released it, what it was trained
# for, the context it was trained at, how many parameters a token passes, and the dtype.
_PUBLISHER = re.compile(r"^(nvidia/)?(nvidia-)?")
_BESIDE = re.compile(r"-(base|instruct|reasoning|chat|\d+k|a\d+b|bf16|fp8|nvfp4)(?=-|$)")
_TOTAL = {"nemotron-3-super": "120b", "nemotron-3-ultra": "550b", "nemotron-3.5-lightning": "30b"}


def preset_of_model_id(model_id: str) -> str | None:
    """The preset with the sizes of a released model, from its id on the hub or its folder's name.

    `nvidia/NVIDIA-Nemotron-3-Nano-30B-A3B-BF16` is `nemotron-3-nano-30b`. None for any other name.
    Releases of one size that differ in their training, dtype or longest context share a preset.
    """
    name = _BESIDE.sub("", _PUBLISHER.sub("", model_id.lower(), count=1))
    for preset, total in _TOTAL.items():
        name = preset if name == f"{preset}-{total}" else name
    return name if name in _VALUES else None
