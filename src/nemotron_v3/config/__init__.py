"""What a model is: typed configs, the spellings that files give them, and the released models."""

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
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

# Imported lazily (PEP 562), so that data workers need not import torch.
_FILES = {
    "BLOCK_TYPES": "blocks",
    "PATTERN": "blocks",
    "PRESETS": "presets",
    "BackendConfig": "backend",
    "MoEConfig": "moe",
    "NemotronV3Config": "model",
    "canonical_block_type": "blocks",
}


def __getattr__(name: str) -> Any:
    if name not in _FILES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    value = getattr(import_module(f"{__name__}.{_FILES[name]}"), name)
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})
