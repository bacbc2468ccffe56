"""One token of a Mamba-2 mixer for the slots of a batch, as the equations say (README.md)."""

import math

import torch
import torch.nn.functional as F
from torch import Tensor


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
    out: Tensor | None = None,
    dtype: torch.dtype = torch.float64,
    activation_dtype: torch.dtype | None = None,
) -> Tensor:
    """The reference: one slot and one head after another, in `dtype`. Arguments: see `op.py`.

    Both states are updated in place, rounded to their own dtype.

    Args:
        activation_dtype: what the convolved x, B and C are rounded to, which a model in bf16 does
            and the truth does not; None is `dtype`.
    """
    R, H, P, N = ssm.shape
    W, inner, width = conv.shape[1], H * P, n_groups * N
    y = torch.zeros(R, H, P, dtype=dtype, device=projected.device)
    for row in range(R):
        if not active[row]:
            continue
        z, xBC, dt = projected[row].split([inner, inner + 2 * width, H])
        position = int(positions[row])
        conv[row, position % W] = xBC.to(conv.dtype)
        u = torch.zeros_like(xBC, dtype=dtype)
        for j in range(W):
            u += conv_weight[:, j].to(dtype) * conv[row, (position - W + 1 + j) % W].to(dtype)
        u = F.silu(u if conv_bias is None else u + conv_bias.to(dtype))
        x, B, C = u.to(activation_dtype or dtype).to(dtype).split([inner, width, width])
        for h in range(H):
            g = h // (H // n_groups)
            x_h, B_g, C_g = x.view(H, P)[h], B.view(-1, N)[g], C.view(-1, N)[g]
            step = F.softplus(dt[h].to(dtype) + dt_bias[h].to(dtype)).clamp(*dt_limit)
            decay = torch.exp(step * -torch.exp(A_log[h].to(dtype)))
            S = decay * ssm[row, h].to(dtype) + step * torch.outer(x_h, B_g)
            ssm[row, h] = S.to(ssm.dtype)
            y_h = S @ C_g + D[h].to(dtype) * x_h
            y[row, h] = y_h * F.silu(z.view(H, P)[h].to(dtype))
    y = y.view(R, inner)
    return y if out is None else out.copy_(y)
