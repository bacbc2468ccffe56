"""A low-rank update beside a projection."""

from typing import NamedTuple

import torch.nn.functional as F
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


def with_update(x: Tensor, y: Tensor, update: LowRank | None) -> Tensor:
    """y, and what an update makes of x `[..., n]`, in y's dtype."""
    if update is None:
        return y
    thin = F.linear(x.to(update.a.dtype), update.a)
    more = F.linear(thin.to(update.b.dtype), update.b)
    return (y + update.scale * more).to(y.dtype)
