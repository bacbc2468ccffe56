"""The group of processes that layers are given, for calls that speak of `cp_size`."""

from typing import Any

from torch import nn
from torch.distributed import ProcessGroup

from nemotron_v3.layers.context_parallel import ContextParallelLayer
from nemotron_v3.layout import SequenceLayout
from nemotron_v3.parallel.context_carry import ContextCarry
from nemotron_v3.parallel.shares import Order, Shares, check_order


class SharedTokens:
    """The `TokenGroup` of a process group.

    Copies of a layer share it; what is saved of a layer has none.

    Args:
        group: the processes.
        layout: how tokens go to them, as in `context_parallel`.
    """

    def __init__(self, group: ProcessGroup, layout: Order):
        self.group = group
        self.layout: Order = layout

    @property
    def size(self) -> int:
        return self.group.size()

    @property
    def rank(self) -> int:
        return self.group.rank()

    def share(self, layout: SequenceLayout) -> tuple[SequenceLayout, ContextCarry]:
        """How this process's tokens lie, and what stands for the others."""
        shares = self.shares(layout)
        return shares.local, ContextCarry(shares, self.group)

    def shares(self, layout: SequenceLayout) -> Shares:
        """Who has which of the packed tokens."""
        key = ("shares", self.size, self.rank, self.layout)
        return layout.derived(key, lambda of: Shares.of(of, self.size, self.rank, self.layout))

    def __deepcopy__(self, memo: Any) -> "SharedTokens":
        return self

    def __reduce__(self) -> Any:
        return _nobody, ()


def _nobody() -> None:
    """What a layer that was saved has for a group."""


def shared_by(module: nn.Module) -> SharedTokens | None:
    """The group that a module's layers were given; None where there is none."""
    for layer in module.modules():
        if isinstance(layer, ContextParallelLayer):
            group = layer.token_group
            return group if isinstance(group, SharedTokens) else None
    return None


def share_tokens(module: nn.Module, group: ProcessGroup, layout: Order = "auto") -> SharedTokens:
    """Let every layer of a module be called with `cp_size` and `cp_rank` of a group.

    Such a call has this process's tokens, and `cu_seqlens` or a layout of those of all. `Shares.of`
    says which tokens those are; "contiguous" gives the processes equal parts in their order.

    Raises:
        ValueError: an unknown layout.
    """
    check_order(layout)
    shared = SharedTokens(group, layout)
    for layer in module.modules():
        if isinstance(layer, ContextParallelLayer):
            layer.token_group = shared
    return shared
