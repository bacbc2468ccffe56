"""PEFT's adapters of `out_proj`, let through for accelerated models and for no others.

By a model's type PEFT refuses adapters of a Mamba model's `out_proj`, since the CUDA kernels that
transformers calls read its weight and would pass the adapter by. Mixers of this package call it as
a module. So PEFT's check asks first whose mixers a model has; its answer about any model whose
mixers are not all accelerated stays what it was.
"""

import sys
from typing import Any

from torch import nn
from transformers.models.nemotron_h import modeling_nemotron_h as theirs

from nemotron_v3.hf.layers import NemotronHMamba2Mixer

_CHECK = "_check_target_module_compatiblity"  # the spelling is PEFT's
_ASKS = "nemotron_v3_asks"


def calls_projections(model: nn.Module) -> bool:
    """Whether a model has Mamba mixers, and each of them is one of this package."""
    mixers = [m for m in model.modules() if isinstance(m, theirs.NemotronHMamba2Mixer)]
    return bool(mixers) and all(isinstance(m, NemotronHMamba2Mixer) for m in mixers)


def exempt_if_loaded() -> None:
    """Teach PEFT's check about accelerated models, if PEFT is imported; once a process."""
    tuners = sys.modules.get("peft.tuners.tuners_utils")
    if tuners is None:
        return
    kind = tuners.BaseTuner
    check = getattr(kind, _CHECK, None)
    if check is None or hasattr(check, _ASKS):  # PEFT has no such check, or it is changed already
        return

    def ask(self: Any, peft_config: Any, model: nn.Module, target_name: str) -> None:
        if target_name == "out_proj" and calls_projections(model):
            return
        check(self, peft_config, model, target_name)

    setattr(ask, _ASKS, True)
    setattr(kind, _CHECK, ask)
