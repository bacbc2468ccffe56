"""NVIDIA's Nemotron-H and Nemotron-3 hybrid models in PyTorch, with Triton kernels on a GPU."""

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from nemotron_v3 import cache as cache
    from nemotron_v3 import checkpoint as checkpoint
    from nemotron_v3 import config as config
    from nemotron_v3 import layers as layers
    from nemotron_v3 import layout as layout
    from nemotron_v3 import model as model
    from nemotron_v3 import ops as ops
    from nemotron_v3.cache import NemotronHybridCache
    from nemotron_v3.checkpoint import from_pretrained, save_pretrained
    from nemotron_v3.config import BackendConfig, MoEConfig, NemotronV3Config
    from nemotron_v3.config.threads import settle_threads
    from nemotron_v3.layout import SequenceLayout
    from nemotron_v3.model.model import NemotronV3ForCausalLM, NemotronV3Model
    from nemotron_v3.model.optim import parameter_groups
    from nemotron_v3.model.report import report
    from nemotron_v3.model.segmented import segmented

__version__ = "0.1.0"

__all__ = [
    "BackendConfig",
    "MoEConfig",
    "NemotronHybridCache",
    "NemotronV3Config",
    "NemotronV3ForCausalLM",
    "NemotronV3Model",
    "SequenceLayout",
    "from_pretrained",
    "parameter_groups",
    "report",
    "save_pretrained",
    "segmented",
    "settle_threads",
]

# Where a public name comes from. A name is imported when somebody asks for it (PEP 562): torch
# takes a second to import, which the command line's help and completion need not wait for.
_SOURCES = {
    "BackendConfig": "config",
    "MoEConfig": "config",
    "NemotronHybridCache": "cache",
    "NemotronV3Config": "config",
    "NemotronV3ForCausalLM": "model.model",
    "NemotronV3Model": "model.model",
    "SequenceLayout": "layout",
    "from_pretrained": "checkpoint",
    "parameter_groups": "model.optim",
    "report": "model.report",
    "save_pretrained": "checkpoint",
    "segmented": "model.segmented",
    "settle_threads": "config.threads",
}
# Rooms that need torch and safetensors alone, as attributes of the package.
_ROOMS = ("cache", "checkpoint", "config", "layers", "layout", "model", "ops")


def __getattr__(name: str) -> Any:
    if name in _ROOMS:
        return import_module(f"nemotron_v3.{name}")
    if name not in _SOURCES:
        raise AttributeError(f"module 'nemotron_v3' has no attribute {name!r}")
    value = getattr(import_module(f"nemotron_v3.{_SOURCES[name]}"), name)
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__, *_ROOMS})
