"""What a model is: typed configs, the spellings that files give them, and the released models."""

from nemotron_v3.config.backend import BackendConfig
from nemotron_v3.config.blocks import BLOCK_TYPES, PATTERN, canonical_block_type
from nemotron_v3.config.model import NemotronV3Config
from nemotron_v3.config.moe import MoEConfig
from nemotron_v3.config.presets import PRESETS

__all__ = [
    "BLOCK_TYPES",
    "PATTERN",
    "PRESETS",
    "BackendConfig",
    "MoEConfig",
    "NemotronV3Config",
    "canonical_block_type",
]
