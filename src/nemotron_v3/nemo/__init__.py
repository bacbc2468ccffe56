"""Acceleration of NeMo AutoModel's Nemotron-H models: their modules, computed by this package.

`accelerate(model)` changes a model in place, `undo(model)` gives it back; `enable()` lets every
such model be built accelerated, whoever builds it. docs/nemo.md says what works.
"""

from nemotron_v3.nemo.accelerate import accelerate, is_accelerated, undo
from nemotron_v3.nemo.enable import backend, disable, enable
from nemotron_v3.nemo.versions import NEWEST, OLDEST, check_version

__all__ = [
    "NEWEST",
    "OLDEST",
    "accelerate",
    "backend",
    "check_version",
    "disable",
    "enable",
    "is_accelerated",
    "undo",
]
