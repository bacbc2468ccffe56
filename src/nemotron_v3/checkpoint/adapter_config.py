"""What an adapter_config.json, a file from somebody else, may say: types and ranges of fields."""

import difflib
import math
from collections.abc import Mapping
from typing import Any

from nemotron_v3.checkpoint.adapter_patterns import pattern_problems

_FLAGS = ("use_rslora", "use_dora", "fan_in_fan_out", "lora_bias", "use_qalora")
_NAMES = ("target_modules", "exclude_modules", "layers_pattern")  # a text, or texts
_LISTS = ("target_parameters", "modules_to_save")
_PATTERNS = ("alpha_pattern", "rank_pattern")
MAX_RANK = 2**20
_FIELDS = """
    alora_invocation_tokens alpha_pattern arrow_config auto_mapping base_model_name_or_path bias
    corda_config ensure_weight_tying eva_config exclude_modules fan_in_fan_out inference_mode
    init_lora_weights kasa_config layer_replication layers_pattern layers_to_transform loftq_config
    lora_alpha lora_bias lora_dropout lora_ga_config megatron_config megatron_core modules_to_save
    monteclora_config peft_type peft_version qalora_group_size r rank_pattern revision
    runtime_config target_modules target_parameters task_type trainable_token_indices use_bdlora
    use_dora use_qalora use_rslora velora_config
"""
KNOWN_FIELDS = frozenset(_FIELDS.split())
"""The fields that PEFT writes. Newer ones are taken where they are numbers, texts or unset: a
switch that is on, or a table, may change what a layer computes."""


def config_problems(config: Mapping[str, Any]) -> list[str]:
    """What the fields of a LoRA adapter's config cannot be; empty where all is well."""
    problems = []
    for key in ("r", "lora_alpha"):
        if key in config and (wrong := _not_a(key, config[key])):
            problems.append(f"{key} is {_shown(config[key])}: {wrong}")
    for key in _FLAGS:
        if config.get(key) not in (None, True, False) or type(config.get(key)) in (int, float):
            problems.append(f"{key} is {_shown(config[key])}: true or false is needed")
    if config.get("bias", "none") not in ("none", "all", "lora_only"):
        problems.append(f"bias is {_shown(config['bias'])}: 'none', 'all' or 'lora_only' is needed")
    for key in (*_NAMES, *_LISTS):
        value = config.get(key)
        texts = isinstance(value, list) and all(isinstance(each, str) for each in value)
        if value is not None and not texts and not (key in _NAMES and isinstance(value, str)):
            problems.append(f"{key} is {_shown(value)}: a list of names is needed")
        elif isinstance(value, str) and value != "all-linear":
            problems += pattern_problems(key, [value])
        elif key == "layers_pattern" and value:
            problems += pattern_problems(key, value)
    problems += _layers_problems(config.get("layers_to_transform"))
    for key in _PATTERNS:
        problems += _table_problems(key, config.get(key))
    return problems + _unknown_problems(config)


def _unknown_problems(config: Mapping[str, Any]) -> list[str]:
    """Fields of a LoRA adapter that nobody reads: misspelt ones, and switches that are on."""
    if config.get("peft_type", "LORA") != "LORA":
        return []
    problems = []
    for key in config.keys() - KNOWN_FIELDS:
        near = difflib.get_close_matches(key, KNOWN_FIELDS, n=1, cutoff=0.8)
        if near:
            problems.append(f"{key[:80]!r} is no field: {near[0]!r} may be meant")
        elif config[key] is True or (isinstance(config[key], (dict, list)) and config[key]):
            problems.append(f"{key[:80]} is {_shown(config[key])}: no field that is known here")
    return sorted(problems)


def _table_problems(key: str, table: Any) -> list[str]:
    if table is None:
        return []
    if not isinstance(table, Mapping):
        return [f"{key} is {_shown(table)}: a table of patterns is needed"]
    kind = "r" if key == "rank_pattern" else "lora_alpha"
    found = [
        f"{key} gives {_shown(value)} for {pattern[:80]!r}: {wrong}"
        for pattern, value in table.items()
        if (wrong := _not_a(kind, value))
    ]
    return found + pattern_problems(key, table)


def _layers_problems(layers: Any) -> list[str]:
    each = layers if isinstance(layers, list) else [] if layers is None else [layers]
    if any(isinstance(i, bool) or not isinstance(i, int) or i < 0 for i in each):
        return [f"layers_to_transform is {_shown(layers)}: indices of layers are needed"]
    return []


def _not_a(key: str, value: Any) -> str | None:
    """What `value` should be, if it is no rank (`r`) or no scale (`lora_alpha`)."""
    if key == "r":
        fine = type(value) is int and 1 <= value <= MAX_RANK
        return None if fine else f"an integer from 1 to {MAX_RANK} is needed"
    fine = type(value) in (int, float) and abs(value) < 2**64 and math.isfinite(value)
    return None if fine else "a finite number is needed"


def _shown(value: Any) -> str:
    if type(value) is int and value.bit_length() > 200:
        return f"a number of {value.bit_length()} bits"
    text = repr(value)
    return text if len(text) <= 80 else f"{text[:80]}..."
