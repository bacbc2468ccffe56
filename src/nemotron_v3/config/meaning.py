"""Keys of other configs that would change what a model computes, which no field here obeys.

Each may stand in a file with the value that says what these models do anyway; any other is refused,
since a model that ignored it would be another one.
"""

from collections.abc import Mapping
from typing import Any

_NO = (None, False, 0)
_ONE = (None, 1)

MEANINGS: dict[str, tuple[Any, ...]] = {
    # Attention: no positional term, no norm of queries and keys, no caps.
    "position_embedding_type": (None, "none", "nope"),
    "use_rope": _NO,
    "use_qk_norm": _NO,
    "qk_norm": _NO,
    "qk_layernorm": _NO,
    "attn_logit_softcapping": _NO,
    "attention_sinks": _NO,
    "use_sliding_window": _NO,
    # Scales of the stream and the logits.
    "embedding_multiplier": _ONE,
    "residual_multiplier": _ONE,
    "attention_multiplier": (None,),
    "logits_scaling": _ONE,
    "logit_scale": _ONE,
    "final_logit_softcapping": _NO,
    # Experts: sigmoid scores with a bias for the choice, squared ReLU without a gate.
    "scoring_func": (None, "sigmoid"),
    "score_func": (None, "sigmoid"),
    "moe_router_score_function": (None, "sigmoid"),
    "topk_method": (None, "noaux_tc"),
    "first_k_dense_replace": _NO,
    "gated_linear_unit": _NO,
    "add_bias_linear": _NO,
}


def check_meanings(data: Mapping[str, Any]) -> None:
    """Raise `ValueError` where a key asks for what no layer does."""
    for key, offered in MEANINGS.items():
        if key in data and not any(data[key] == value for value in offered):
            way = " or ".join(str(value) for value in offered if value is not None) or "null"
            raise ValueError(
                f"{key} is {data[key]!r}, which no layer here does: the model would be another "
                f"one; only {way} is read"
            )
    experts = data.get("mtp_n_routed_experts")
    predicts = data.get("num_nextn_predict_layers")
    if experts is not None and predicts and not data.get("mtp_block_configs"):
        of_model = data.get("n_routed_experts")
        if experts != of_model:
            raise ValueError(
                f"mtp_n_routed_experts is {experts!r} and n_routed_experts {of_model!r}: give "
                "mtp_block_configs, whose moe entry says so"
            )
