"""The core of a Mamba-2 mixer for one token a row, in plain PyTorch. Letters: see `op.py`."""

import torch
import torch.nn.functional as F
from torch import Tensor

from nemotron_v3.ops.common.precision import WIDE
from nemotron_v3.ops.gated_rms_norm.portable import gated_rms_norm
from nemotron_v3.ops.ssm_step.portable import ssm_step


def mamba2_step(
    zxbcdt: Tensor,
    conv_weight: Tensor,
    conv_bias: Tensor | None,
    dt_bias: Tensor,
    A_log: Tensor,
    D: Tensor,
    norm_weight: Tensor,
    *,
    conv_state: Tensor,
    ssm_state: Tensor,
    n_groups: int,
    head_dim: int,
    state_size: int,
    dt_limit: tuple[float, float] = (0.0, float("inf")),
    eps: float = 1e-5,
) -> Tensor:
    H, P, G, N = A_log.shape[0], head_dim, n_groups, state_size
    z, xBC, dt = zxbcdt.split_with_sizes([H * P, H * P + 2 * G * N, H], -1)
    xBC = _conv_step(xBC, conv_weight, conv_bias, conv_state)
    x, B, C = xBC.split_with_sizes([H * P, G * N, G * N], -1)
    y = ssm_step(
        ssm_state,
        x.unflatten(-1, (H, P)),
        dt,
        -torch.exp(A_log.to(WIDE[A_log.dtype])),
        B.unflatten(-1, (G, N)),
        C.unflatten(-1, (G, N)),
        D=D,
        dt_bias=dt_bias,
        dt_limit=dt_limit,
    )
    return gated_rms_norm(y.flatten(-2), z, norm_weight, H * P // G, eps)


def _conv_step(xBC: Tensor, weight: Tensor, bias: Tensor | None, state: Tensor) -> Tensor:
    """Push the newest input into the state `[rows, conv_dim, W]`; return the output after SiLU."""
    state.copy_(torch.cat([state[..., 1:], xBC[..., None]], dim=-1))
    dtype = WIDE[xBC.dtype]
    y = torch.linalg.vecdot(state.to(dtype), weight.to(dtype))
    if bias is not None:
        y = y.add_(bias.to(dtype))
    return F.silu(y, inplace=True).to(xBC.dtype)
