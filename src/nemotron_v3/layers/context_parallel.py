"""Objects for context parallelism, which other programs set on layers: no layer can honour one."""

from typing import Any, NoReturn

from torch import nn

_NAMES = ("cp", "cp_mesh", "attn_module")


class RefusesContextParallel(nn.Module):
    """A layer on which nothing can be set that would spread the tokens of a document.

    Attributes:
        cp, cp_mesh: None. Setting anything else raises `ValueError` at once: the layer would
            compute with its own part of the tokens alone.
    """

    cp = None
    cp_mesh = None

    def __setattr__(self, name: str, value: Any) -> None:
        if name in _NAMES and value is not None:
            refuse(f"{name} = {_described(value)}", type(self).__name__)
        super().__setattr__(name, value)


def refuse(what: str, layer: str) -> NoReturn:
    """Raises ValueError for an object that would spread the tokens of a document."""
    raise ValueError(
        f"{what} on a {layer}: this layer cannot share a document's tokens with other processes "
        "and would compute with its own part of them; shard parameters and batches instead "
        "(nemotron_v3.parallel.shard_model)"
    )


def _described(value: Any) -> str:
    return f"a {type(value).__module__}.{type(value).__qualname__}"
