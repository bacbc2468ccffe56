"""How many tokens each process of a group has, agreed once a pass through the hosts."""

from typing import Any

import torch
import torch.distributed as dist
from torch import nn
from torch.distributed import ProcessGroup

from nemotron_v3.layers.moe.router import made_once


class TokenCounts:
    """The tokens of every process of a group in the pass at hand.

    The first layer of a pass that asks has the hosts tell each other; the others read what they
    said, and so does a recomputation, whenever it comes. No device is waited for.

    Args:
        group: of the hosts.
        backbone: whose forward pass begins a new pass.
    """

    def __init__(self, group: ProcessGroup, backbone: nn.Module):
        self.group = group
        self._counts: list[int] | None = None
        backbone.register_forward_pre_hook(self._begin)

    def of(self, tokens: int) -> list[int]:
        """By rank; this process has so many.

        Raises:
            RuntimeError: not as many as the layers before had in the same pass.
        """
        counts = made_once((self, "counts"), lambda: self._agreed(tokens))
        if counts[self.group.rank()] != tokens:
            raise RuntimeError(
                f"a layer of experts got {tokens} tokens where the one before it got "
                f"{counts[self.group.rank()]}: call the layers through their model, whose "
                "processes tell each other once a pass how many tokens they have"
            )
        return counts

    def _agreed(self, tokens: int) -> list[int]:
        if self._counts is None:
            mine = torch.tensor([tokens])
            every = [torch.empty_like(mine) for _ in range(self.group.size())]
            dist.all_gather(every, mine, group=self.group)
            self._counts = [int(each) for each in every]
        return self._counts

    def _begin(self, *_: Any) -> None:
        self._counts = None
