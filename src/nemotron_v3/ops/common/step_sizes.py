"""The step sizes dt of the Mamba-2 recurrence, as every plain form computes them."""

import torch.nn.functional as F
from torch import Tensor

from nemotron_v3.ops.common.precision import WIDE


def step_sizes(dt: Tensor, dt_bias: Tensor | None, dt_limit: tuple[float, float]) -> Tensor:
    """`clamp(softplus(dt + dt_bias), *dt_limit)` in fp32 or wider: `[..., H]` -> `[..., H]`."""
    dt = dt.to(WIDE[dt.dtype])
    if dt_bias is not None:
        dt = dt + dt_bias.to(dt.dtype)
    return F.softplus(dt).clamp(*dt_limit)
