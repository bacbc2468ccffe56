"""A low-rank update beside a projection."""

from typing import NamedTuple

from torch import Tensor


class LowRank(NamedTuple):
    """`scale b a`, added to a weight `[m, n]` (LoRA, Hu et al. 2021, arXiv 2106.09685).

    Attributes:
        a: `[r, n]`, contiguous; b: `[m, r]`, contiguous; in any dtype of 32 bits at most.
        scale: of the update.
    """

    a: Tensor
    b: Tensor
    scale: float
