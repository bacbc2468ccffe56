"""Which weights an adapter should act on, and how much of a model it reaches."""

from nemotron_v3.adapters.coverage import Coverage, CoverageRow, coverage
from nemotron_v3.adapters.targets import DEFAULT_GROUPS, GROUPS, LoraTargets, lora_targets

__all__ = [
    "DEFAULT_GROUPS",
    "GROUPS",
    "Coverage",
    "CoverageRow",
    "LoraTargets",
    "coverage",
    "lora_targets",
]
