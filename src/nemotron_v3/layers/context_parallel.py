"""Context parallelism as a layer sees it: the group that `nemotron_v3.parallel` sets on it, and the
objects of other libraries, which it refuses."""

from typing import Any, NoReturn, Protocol, cast

from torch import nn

from nemotron_v3.layers.carry import Carry
from nemotron_v3.layout import SequenceLayout

_NAMES = ("cp", "cp_mesh", "attn_module")


class TokenGroup(Protocol):
    """Processes that share the tokens of a batch.

    Attributes:
        size, rank: how many they are, and which of them this is.
    """

    @property
    def size(self) -> int: ...

    @property
    def rank(self) -> int: ...

    def share(self, layout: SequenceLayout) -> tuple[SequenceLayout, Carry]:
        """Of packed tokens: how those of this process lie, and what stands for the others."""
        ...


class ContextParallelLayer(nn.Module):
    """Base of all mixers: holds the group of context parallelism, and refuses another library's.

    Processes share tokens by `nemotron_v3.parallel`, with `Plan(cp=...)` or `share_tokens`.

    Attributes:
        token_group: the processes that `cp_size` and `cp_rank` of a call speak of; None where there
            are none, and a call that speaks of several is refused.
        cp, cp_mesh: None. Setting another library's object raises `ValueError` at once: the layer
            would compute with its own part of the tokens alone.
    """

    cp = None
    cp_mesh = None
    token_group: TokenGroup | None = None

    def __setattr__(self, name: str, value: Any) -> None:
        if name in _NAMES and value is not None:
            refuse(f"{name} = {_described(value)}", type(self).__name__)
        super().__setattr__(name, cast(Any, value))


def refuse(what: str, layer: str) -> NoReturn:
    """Raises ValueError for an object that would spread the tokens of a document."""
    raise ValueError(
        f"{what} on a {layer}: the layer does not read it and would compute with its own part of "
        "the tokens alone; share tokens by nemotron_v3.parallel, with Plan(cp=...) or share_tokens"
    )


def _described(value: Any) -> str:
    return f"a {type(value).__module__}.{type(value).__qualname__}"
