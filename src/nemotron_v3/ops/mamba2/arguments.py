"""What the forms of the core with an exchange take, as `op.mamba2` is given it."""

from typing import NamedTuple

from torch import Tensor


class Tensors(NamedTuple):
    """Letters: T packed tokens, H heads, P head width, G groups, N state, W conv taps."""

    zxbcdt: Tensor  # [T, 2*H*P + 2*G*N + H]
    conv_weight: Tensor  # [conv_dim, W]
    conv_bias: Tensor | None  # [conv_dim]
    dt_bias: Tensor  # [H]
    A_log: Tensor  # [H]
    D: Tensor  # [H]
    norm_weight: Tensor  # [H*P]


class Options(NamedTuple):
    """Numbers that are not in the tensors' shapes."""

    n_groups: int
    head_dim: int
    state_size: int
    chunk_size: int
    dt_limit: tuple[float, float]
    eps: float
