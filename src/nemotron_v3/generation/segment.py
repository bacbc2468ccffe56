"""What comes out of some steps of generation, before the host has looked at it.

Letters: R rows.
"""

from dataclasses import dataclass
from functools import cached_property

import torch
from torch import Tensor


@dataclass(frozen=True)
class Segment:
    """Steps between two looks of the host.

    Attributes:
        pending: the token `[R]` that was fed before the first draw; None where that was the prompt.
        drawn: the tokens `[R]` of each step.
        logprobs: their log-probabilities, or empty.
    """

    pending: Tensor | None
    drawn: list[Tensor]
    logprobs: list[Tensor]

    @cached_property
    def values(self) -> list[list[int]]:
        """`drawn` on the host."""
        return torch.stack(self.drawn).tolist()

    def fed(self, place: int, count: int) -> Tensor:
        """What was fed to one place until its `count`-th token of the segment was drawn."""
        first = [] if self.pending is None else [self.pending[place].item()]
        drawn = [tokens[place] for tokens in self.values[: count - 1]]
        return torch.tensor(first + drawn, dtype=torch.int64, device="cpu")
