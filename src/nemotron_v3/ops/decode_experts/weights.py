"""What the router of a layer is told."""

from typing import NamedTuple

from torch import Tensor


class Router(NamedTuple):
    """The norm before a mixture of experts, and its router.

    Attributes:
        gain: `[D]`, the norm's weight; eps: its constant.
        gate: `[E, D]`, the router's weight; bias: `[E]`, of the choice.
        weights_use_bias: whether the weights hold the bias too.
    """

    gain: Tensor
    eps: float
    gate: Tensor
    bias: Tensor
    top_k: int
    n_group: int
    topk_group: int
    norm_topk_prob: bool
    scaling_factor: float
    weights_use_bias: bool
