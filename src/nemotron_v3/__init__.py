"""NVIDIA's Nemotron-3 hybrid Mamba-2 / attention / mixture-of-experts models, in plain PyTorch."""

from nemotron_v3.cache import NemotronHybridCache
from nemotron_v3.checkpoint import from_pretrained, save_pretrained
from nemotron_v3.config import BackendConfig, MoEConfig, NemotronV3Config
from nemotron_v3.layout import SequenceLayout
from nemotron_v3.model.model import NemotronV3ForCausalLM, NemotronV3Model
from nemotron_v3.model.optim import parameter_groups
from nemotron_v3.model.report import report

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
]
