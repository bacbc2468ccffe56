"""transformers' Nemotron-H models, computed by this package.

`accelerate(model)` changes a model in place, `undo(model)` gives it back; `register()` lets every
such model be built accelerated, whoever builds it. docs/transformers.md says what works.
"""

from nemotron_v3.hf.versions import NEWEST, OLDEST, check_version

check_version()  # before imports from transformers that other versions lack

from nemotron_v3.hf.accelerate import accelerate, is_accelerated, undo  # noqa: E402
from nemotron_v3.hf.heads import (  # noqa: E402
    NemotronHForSequenceClassification,
    NemotronHForTokenClassification,
)
from nemotron_v3.hf.model import NemotronHForCausalLM, NemotronHModel  # noqa: E402
from nemotron_v3.hf.register import NemotronHConfig, register, unregister  # noqa: E402
from nemotron_v3.hf.report import report  # noqa: E402

__all__ = [
    "NEWEST",
    "OLDEST",
    "NemotronHConfig",
    "NemotronHForCausalLM",
    "NemotronHForSequenceClassification",
    "NemotronHForTokenClassification",
    "NemotronHModel",
    "accelerate",
    "check_version",
    "is_accelerated",
    "register",
    "report",
    "undo",
    "unregister",
]
