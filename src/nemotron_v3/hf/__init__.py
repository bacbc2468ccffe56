"""At home in transformers: its Nemotron-H models, computed by this package.

`accelerate(model)` changes a model in place, `undo(model)` gives it back; `register()` makes
transformers' auto classes build accelerated models. docs/transformers.md says what works.
"""

from nemotron_v3.hf.versions import NEWEST, OLDEST, check_version

check_version()  # before anything of transformers that another version may not have

from nemotron_v3.hf.accelerate import accelerate, is_accelerated, undo  # noqa: E402
from nemotron_v3.hf.model import NemotronHForCausalLM  # noqa: E402
from nemotron_v3.hf.register import NemotronHConfig, register, unregister  # noqa: E402
from nemotron_v3.hf.report import report  # noqa: E402

__all__ = [
    "NEWEST",
    "OLDEST",
    "NemotronHConfig",
    "NemotronHForCausalLM",
    "accelerate",
    "check_version",
    "is_accelerated",
    "register",
    "report",
    "undo",
    "unregister",
]
