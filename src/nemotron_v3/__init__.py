"""NVIDIA's Nemotron-3 hybrid Mamba-2 / attention / mixture-of-experts models, in plain PyTorch."""

from nemotron_v3.config import BackendConfig, MoEConfig, NemotronV3Config
from nemotron_v3.layout import SequenceLayout
from nemotron_v3.model.model import NemotronV3ForCausalLM, NemotronV3Model
from nemotron_v3.model.optim import parameter_groups

__version__ = "0.1.0"

__all__ = [
    "BackendConfig",
    "MoEConfig",
    "NemotronV3Config",
    "NemotronV3ForCausalLM",
    "NemotronV3Model",
    "SequenceLayout",
    "parameter_groups",
]
