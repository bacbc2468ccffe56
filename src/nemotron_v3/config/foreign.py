"""What a part of a model reads of a foreign object, and what becomes of fields that nobody reads.

A layer alone checks what it reads and nothing else: an attention layer has no business with the
experts that a foreign config describes beside it. And nothing foreign is ignored by omission: a
field is honoured, or stands in one of the lists here since it changes nothing, or is refused.
"""

import dataclasses
from collections.abc import Collection, Mapping
from numbers import Real
from typing import Any

from nemotron_v3.config.spelling import MISSING, Setting, attribute, closest, keys_of

_LAYER = ("hidden_size", "initializer_range", "rescale_prenorm_residual", "dtype")
_MAMBA_SIZES = ("mamba_num_heads", "mamba_head_dim", "ssm_state_size", "n_groups", "conv_kernel")
_KEY_SIZES = ("num_key_value_heads", "num_attention_heads", "head_dim")

# Fields of a model's config, by the part that reads them.
READ_BY: dict[str, tuple[str, ...]] = {
    "types": ("layers_block_type", "block_configs"),
    "block": (*_LAYER, "block_configs", "layer_norm_epsilon", "residual_in_fp32", "hidden_dropout"),
    "attention": (
        *(*_LAYER, *_KEY_SIZES, "attention_bias", "attention_dropout", "sliding_window"),
    ),
    "mamba": (
        *(*_LAYER, *_MAMBA_SIZES, "chunk_size", "mamba_hidden_act", "use_conv_bias", "use_bias"),
        *("time_step_min", "time_step_max", "time_step_floor", "time_step_limit"),
        "layer_norm_epsilon",
    ),
    "mlp": (*_LAYER, "intermediate_size", "mlp_hidden_act", "mlp_bias"),
    "moe": (
        *(*_LAYER, "mlp_hidden_act", "mlp_bias", "n_routed_experts"),
        *("n_shared_experts", "num_experts_per_tok", "moe_intermediate_size", "moe_latent_size"),
        *("moe_shared_expert_intermediate_size", "n_group", "topk_group", "norm_topk_prob"),
        "routed_scaling_factor",
    ),
    "moe beside a moe_config": (*_LAYER, "mlp_bias"),
    "cache": (
        *("layers_block_type", *_KEY_SIZES, *_MAMBA_SIZES, "mamba_ssm_cache_dtype", "dtype"),
    ),
}

# Fields of NeMo AutoModel's MoEConfig that change nothing here, and why.
INERT_MOE_FIELDS = {
    "router_weights_fp32": "a token's weights are fp32 or wider always",
    "apply_router_weight_after_down": "the product is the same, up to rounding",
    "softmax_before_topk": "scores are sigmoids",
    "activation_alpha": "of gated activations",
    "activation_limit": "of gated activations",
    "swiglu_limit": "of gated activations",
}
# The same of its BackendConfig: how its own modules compute what is the same here.
INERT_BACKEND_FIELDS = {
    "experts": "which of its kernels multiplies",
    "dispatcher": "how tokens reach experts of other processes; Plan(dispatcher=...) says so here",
    "dispatcher_num_sms": "of such a dispatcher",
    "enable_deepep": "an older name of such a dispatcher",
    "rope_fusion": "there is no rotary embedding",
    "gate_precision": "the router computes in fp32 or wider always",
    "enable_hf_state_dict_adapter": "of its checkpoints",
    "enable_fsdp_optimizations": "of its sharding",
}
# Of a model's config: dropout that would act, and what is no part of the model.
_DROPOUT_ELSEWHERE = ("attention_dropout", "hidden_dropout", "classifier_dropout")


def check_fields(
    what: str, source: object, settings: Mapping[str, Setting], inert: Collection[str]
) -> None:
    """Refuse a field of a foreign mapping or dataclass that nothing here knows.

    A dataclass may hold a field as its class sets it: a newer release with one more field is no
    error until it is used.

    Raises:
        ValueError: the field and its value.
    """
    known = {key for name, spelled in settings.items() for key in keys_of(name, spelled)}
    known |= set(inert)
    if isinstance(source, Mapping):
        fields = dict(source)
    elif dataclasses.is_dataclass(source):
        fields = {
            field.name: getattr(source, field.name)
            for field in dataclasses.fields(source)
            if not _is_default(getattr(source, field.name), field)
        }
    else:
        return
    for name, value in fields.items():
        if name not in known:
            nearest = closest(str(name), known)
            way = f"did you mean {nearest[0]}?" if nearest else "leave it at its default"
            raise ValueError(f"{what}.{name} is {value!r}, and nothing here reads it: {way}")


def _is_default(value: Any, field: dataclasses.Field) -> bool:
    default = field.default
    if field.default_factory is not dataclasses.MISSING:
        default = field.default_factory()
    return default is value or (type(default) is type(value) and bool(default == value))


def check_dropout(source: object) -> None:
    """Refuse dropout that no layer has, by whatever name a foreign config gives it.

    Raises:
        ValueError: the field and its value.
    """
    fields = source if isinstance(source, Mapping) else getattr(source, "__dict__", {})
    for name in fields:
        key = str(name).lower()
        if name in _DROPOUT_ELSEWHERE or not ("dropout" in key or key.endswith("_pdrop")):
            continue
        value = fields[name] if isinstance(source, Mapping) else attribute(source, name)
        number = isinstance(value, Real) and not isinstance(value, bool)
        if value is not MISSING and number and value != 0:
            raise ValueError(
                f"{name} is {value!r}, and no layer drops anything there: set it to 0.0 "
                "(attention_dropout acts on attention weights)"
            )
