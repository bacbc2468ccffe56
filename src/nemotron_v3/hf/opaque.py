"""Functions as `torch.compile` is to see them: calls that it makes and does not look into.

The ops work out index tables on the host from the lengths of documents, which a graph would be
compiled anew for. What lies between them, projections and norms, is compiled.
"""

from collections.abc import Callable
from typing import Any

import torch

from nemotron_v3.layers import mamba2_by_modules as by_modules
from nemotron_v3.model import loss
from nemotron_v3.ops.registry import FUNCTIONS

mamba2_by_modules: Callable[..., Any] = torch.compiler.disable(by_modules.mamba2_by_modules)
refuse_stray_label: Callable[..., Any] = torch.compiler.disable(loss.refuse_stray_label)
targets_of: Callable[..., Any] = torch.compiler.disable(loss.targets_of)

_OPS = {name: torch.compiler.disable(function) for name, function in FUNCTIONS.items()}


def __getattr__(name: str) -> Callable[..., Any]:
    """Any op of `nemotron_v3.ops`."""
    if name not in _OPS:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return _OPS[name]
