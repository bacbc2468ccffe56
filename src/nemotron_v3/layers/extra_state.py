"""State dicts that have the same names whatever class a backend puts in a place."""

from typing import Any

from torch import nn

_NAME = "_extra_state"


def keep_state_dict_names(module: nn.Module) -> nn.Module:
    """Leave a module's `_extra_state` out of state dicts, and do not miss it when one is loaded.

    Transformer Engine's modules add that entry for their FP8 scales. Names in memory are those of
    plain modules, so that a state dict fits every backend; a delayed-scaling recipe starts its
    history anew after a load.
    """
    module.register_state_dict_post_hook(_drop)
    module.register_load_state_dict_post_hook(_do_not_miss)
    return module


def _drop(module: nn.Module, state: dict[str, Any], prefix: str, metadata: Any) -> None:
    state.pop(prefix + _NAME, None)


def _do_not_miss(module: nn.Module, incompatible: Any) -> None:
    missing = incompatible.missing_keys
    missing[:] = [key for key in missing if key.rsplit(".", 1)[-1] != _NAME]
