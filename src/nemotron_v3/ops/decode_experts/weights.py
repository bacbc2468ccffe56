"""What the router of a layer is told, and the low-rank updates of its experts."""

from typing import NamedTuple

from torch import Tensor

from nemotron_v3.ops.common.low_rank import LowRank


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


class Updates(NamedTuple):
    """Low-rank updates (`LowRank`) of a layer's experts, each of which may be missing.

    Attributes:
        up, down: of the routed experts, one an expert: a `[E, r, X]` and b `[E, F, r]`; a
            `[E, r, F]` and b `[E, X, r]`.
        shared_up, shared_down: of the shared expert.
    """

    up: LowRank | None = None
    down: LowRank | None = None
    shared_up: LowRank | None = None
    shared_down: LowRank | None = None
