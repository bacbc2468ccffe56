"""A norm in front of a projection."""

from typing import NamedTuple

from torch import Tensor


class Norm(NamedTuple):
    """`weight * x / sqrt(mean(x^2) + eps)`, the mean over each group of inputs.

    Attributes:
        weight: `[n]`.
        eps: above 0.
        group: inputs of a group, of which n is a multiple; 0 for all of them.
    """

    weight: Tensor
    eps: float
    group: int = 0
