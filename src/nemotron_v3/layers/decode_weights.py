"""What a decode step reads of each layer: its weights and sizes, without its calls.

A step that is laid out once for a cache (`generation/cpu_decode`) asks each layer for these by
`decode_weights()`. They are the parameters' own tensors, detached.
"""

from typing import NamedTuple, cast

from torch import Tensor, nn


class Projection(NamedTuple):
    """`[outputs, inputs]`, and the bias or None."""

    weight: Tensor
    bias: Tensor | None

    @classmethod
    def of(cls, linear: nn.Module) -> "Projection":
        weight, bias = cast(Tensor, linear.weight), getattr(linear, "bias", None)
        return cls(weight.detach(), None if bias is None else bias.detach())


class NormWeights(NamedTuple):
    weight: Tensor
    eps: float


class Mamba2Weights(NamedTuple):
    """Letters: H heads, P head width, G groups, N state, W conv taps, C convolved channels."""

    in_proj: Projection
    conv_weight: Tensor  # [C, W]
    conv_bias: Tensor | None
    dt_bias: Tensor  # [H]
    A_log: Tensor  # [H]
    D: Tensor  # [H]
    norm: NormWeights
    out_proj: Projection
    head_dim: int  # P
    n_groups: int  # G
    state_size: int  # N
    dt_limit: tuple[float, float]


class AttentionWeights(NamedTuple):
    q_proj: Projection
    k_proj: Projection
    v_proj: Projection
    o_proj: Projection
    head_dim: int


class MLPWeights(NamedTuple):
    up_proj: Projection
    down_proj: Projection


class MoEWeights(NamedTuple):
    """The router and the experts are modules too: where they do more, they are called."""

    router: nn.Module
    experts: nn.Module
    up_proj: Tensor  # [E, F, X]
    down_proj: Tensor  # [E, X, F]
    shared: MLPWeights | None
    into_latent: Projection | None
    from_latent: Projection | None
