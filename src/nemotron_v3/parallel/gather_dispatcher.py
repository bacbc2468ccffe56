"""Every process of a group gets all tokens, computes its own experts for them, and sends each
token's sum back to where it came from.

Letters: R processes of the group, T tokens of this one, n the most tokens of any of them, K choices
a token, E experts in all, X width the experts see.
"""

from collections.abc import Callable
from typing import NamedTuple

import torch
from torch import Tensor
from torch.distributed import ProcessGroup
from torch.nn.functional import pad

from nemotron_v3.layers.moe.dispatcher import Experts
from nemotron_v3.parallel.collectives import gather, sums_of
from nemotron_v3.parallel.token_counts import TokenCounts


class Owned(NamedTuple):
    """The experts of this process: those from `first` to before `end`, of all that there are."""

    first: int
    end: int
    all: int

    def numbers(self, indices: Tensor) -> Tensor:
        """Expert numbers among all -> among those here; for others how many are here."""
        here = (indices >= self.first) & (indices < self.end)
        return torch.where(here, indices - self.first, self.end - self.first)


class Arriving(NamedTuple):
    """What comes from all processes: each is called for the tensor, once it is needed."""

    chosen: Callable[[], Tensor]
    weights: Callable[[], Tensor]
    x: Callable[[], Tensor]


class GatherDispatcher:
    """For a few processes: shapes that do not depend on the routing, so that no host waits.

    A process that has fewer tokens than another fills up with rows of no expert. Each half of the
    way is copies alone, and sums are made in the order of the ranks: two runs are equal, bit for
    bit. A token's sum over its experts is made in fp32 on each process, rounded to the dtype of the
    experts' output for the way, and the R parts are added in fp32.

    Args:
        group: the processes that the experts are spread over.
        owned: those of this one.
        counts: how many tokens each process has.
    """

    arrives_later = True  # tokens are on their way when `dispatch` returns

    def __init__(self, group: ProcessGroup, owned: Owned, counts: TokenCounts):
        self.group, self.owned, self.counts = group, owned, counts

    def dispatch(self, x: Tensor, indices: Tensor, weights: Tensor) -> tuple[Arriving, int]:
        T = len(x)
        most = max(self.counts.of(T))
        rows = [indices.to(torch.int32), weights, x]  # a 32-bit number is half of what travels
        if most > T:
            # Of expert E, which is nowhere.
            rows = [
                pad(t, (0, 0, 0, most - T), value=value)
                for t, value in zip(rows, (self.owned.all, 0, 0), strict=True)
            ]
        return Arriving(*(gather(t, self.group) for t in rows)), T

    def compute(self, dispatched: Arriving, experts: Experts) -> Tensor:
        chosen, weights, x = (arrived() for arrived in dispatched)
        return experts(x, self.owned.numbers(chosen).to(torch.int64), weights)

    def combine(self, y: Tensor, metadata: int) -> Tensor:
        return sums_of(y, self.group)()[:metadata]
