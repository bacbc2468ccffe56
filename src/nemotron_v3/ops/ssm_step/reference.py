"""One token of the recurrence, as the equations say. Letters: see `op.py`."""

import torch
import torch.nn.functional as F
from torch import Tensor


def ssm_step(
    state: Tensor,
    x: Tensor,
    dt: Tensor,
    A: Tensor,
    B: Tensor,
    C: Tensor,
    *,
    D: Tensor | None = None,
    dt_bias: Tensor | None = None,
    dt_limit: tuple[float, float] = (0.0, float("inf")),
    dtype: torch.dtype = torch.float64,
) -> Tensor:
    """The reference: everything in `dtype`, one row and one head after another.

    `state` is updated in place, rounded to its own dtype.
    """
    rows, heads, _ = x.shape
    y = torch.empty(x.shape, dtype=dtype, device=x.device)
    step = dt.to(dtype) if dt_bias is None else dt.to(dtype) + dt_bias.to(dtype)
    step = F.softplus(step).clamp(*dt_limit)
    for row in range(rows):
        for h in range(heads):
            g = h // (heads // B.shape[1])
            x_h, B_g, C_g = (t.to(dtype) for t in (x[row, h], B[row, g], C[row, g]))
            decay = torch.exp(step[row, h] * A[h].to(dtype))
            S = decay * state[row, h].to(dtype) + step[row, h] * torch.outer(x_h, B_g)
            y[row, h] = S @ C_g if D is None else S @ C_g + D[h].to(dtype) * x_h
            state[row, h] = S.to(state.dtype)
    return y
