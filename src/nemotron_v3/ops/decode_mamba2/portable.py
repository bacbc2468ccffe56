"""One token of a Mamba-2 mixer for the slots of a batch, in plain PyTorch. Letters: see `op.py`.

Nothing here depends on a value on the host, so a CUDA graph can hold it.
"""

import math

import torch
import torch.nn.functional as F
from torch import Tensor

from nemotron_v3.ops.common.precision import WIDE
from nemotron_v3.ops.common.step_sizes import step_sizes


def decode_mamba2(
    projected: Tensor,
    conv: Tensor,
    ssm: Tensor,
    positions: Tensor,
    active: Tensor,
    *,
    conv_weight: Tensor,
    conv_bias: Tensor | None,
    dt_bias: Tensor,
    A_log: Tensor,
    D: Tensor,
    n_groups: int,
    dt_limit: tuple[float, float] = (0.0, math.inf),
    out: Tensor,
) -> Tensor:
    R, H, P, N = ssm.shape
    inner, width = H * P, n_groups * N
    dtype, on = WIDE[ssm.dtype], active != 0
    z, xBC, dt = projected.split([inner, inner + 2 * width, H], dim=1)
    _put(conv, xBC, positions, on)
    x, B, C = _convolve(conv, positions, conv_weight, conv_bias, xBC.dtype).split(
        [inner, width, width], dim=1
    )
    share = H // n_groups
    x = x.view(R, H, P).to(dtype)
    B, C = (t.view(R, n_groups, 1, N).to(dtype) for t in (B, C))
    step = step_sizes(dt, dt_bias, dt_limit).to(dtype)
    decay = torch.exp(step * -torch.exp(A_log.to(dtype)))
    dtx = (step[..., None] * x).view(R, n_groups, share * P, 1)
    S = (decay[..., None, None] * ssm.to(dtype)).view(R, n_groups, share * P, N) + dtx * B
    y = torch.matmul(S, C.transpose(2, 3)).view(R, H, P) + D.to(dtype)[:, None] * x
    ssm.copy_(torch.where(on[:, None, None, None], S.view_as(ssm), ssm))
    y = y.view(R, inner) * F.silu(z.to(dtype))
    return out.copy_(y.masked_fill(~on[:, None], 0))


def _put(conv: Tensor, xBC: Tensor, positions: Tensor, on: Tensor) -> None:
    """Write the newest inputs to their places in the rings of rows that are `on`."""
    place = (positions % conv.shape[1])[:, None, None].expand(-1, 1, conv.shape[2])
    newest = torch.where(on[:, None, None], xBC[:, None].to(conv.dtype), conv.gather(1, place))
    conv.scatter_(1, place, newest)


def _convolve(
    conv: Tensor, positions: Tensor, weight: Tensor, bias: Tensor | None, kind: torch.dtype
) -> Tensor:
    """`[R, C]` after SiLU in `kind`: each place of the ring meets the tap of its age."""
    W, dtype = conv.shape[1], WIDE[kind]
    places = torch.arange(W, device=conv.device)
    age = (positions[:, None] - places) % W  # [R, W], in tokens
    taps = weight.t().to(dtype)[W - 1 - age]  # [R, W, C]
    u = (conv.to(dtype) * taps).sum(1)
    return F.silu(u if bias is None else u + bias.to(dtype)).to(kind)
