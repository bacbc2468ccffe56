"""One token of the recurrence in plain PyTorch. Letters: see `op.py`; R = H / G."""

import torch
from torch import Tensor

from nemotron_v3.ops.common.precision import WIDE
from nemotron_v3.ops.common.step_sizes import step_sizes


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
) -> Tensor:
    rows, H, P, N = state.shape
    G = B.shape[1]
    dtype = WIDE[state.dtype]
    S = state.to(dtype)  # the state itself where it is wide already: updated in place
    dt = step_sizes(dt, dt_bias, dt_limit).to(dtype)
    x_wide = x.to(dtype)
    S.mul_(torch.exp(dt * A.to(dtype))[..., None, None])
    by_group = S.view(rows * G, -1, N)  # [rows*G, R*P, N]
    dtx = (dt[..., None] * x_wide).view(rows * G, -1, 1)
    by_group.addcmul_(dtx, B.to(dtype).reshape(rows * G, 1, N))
    # C from the left: MKL runs a batch of (matrix, column) products several times slower.
    C_row = C.to(dtype).reshape(rows * G, 1, N)
    y = torch.bmm(C_row, by_group.transpose(1, 2)).view(rows, H, P)
    if D is not None:
        y.addcmul_(D.to(dtype)[:, None], x_wide)
    if S is not state:
        state.copy_(S)
    return y.to(x.dtype)
