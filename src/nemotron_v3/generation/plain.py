"""Which modules a decode step may pass by, because it does their work itself."""

from torch import nn

from nemotron_v3.layers.hooks import is_observed
from nemotron_v3.layers.moe.dispatcher import LocalDispatcher

LAYERS = ("nemotron_v3.layers.", "nemotron_v3.model.")
TORCH = (nn.Linear, nn.Conv1d, nn.Embedding, nn.ModuleList)


def why_called(module: nn.Module, updates: bool = False) -> str | None:
    """Why a module has to be called, or None where its weights are all there is to it.

    Args:
        updates: whether the step computes low-rank updates of experts too.
    """
    if is_observed(module):
        return "has hooks, or another forward, that must be called"
    kind = type(module)
    if kind not in TORCH and not kind.__module__.startswith(LAYERS):
        return f"is a {kind.__name__}, not the plain layer"
    low_rank = getattr(module, "low_rank", None)
    if low_rank is not None and not low_rank.merged and not updates:
        return "has an adapter that is not merged"
    if not _is_local(getattr(module, "dispatcher", None)):
        return "sends its tokens elsewhere"
    return None


def _is_local(dispatcher: object) -> bool:
    """Whether there is no dispatcher, or one that leaves the tokens where they are."""
    if dispatcher is None:
        return True
    # A method put in place on the object would be among its own attributes.
    return type(dispatcher) is LocalDispatcher and not vars(dispatcher)
