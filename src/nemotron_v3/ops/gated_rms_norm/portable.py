"""Gated, grouped RMS normalisation in plain PyTorch. Letters: T packed tokens, D width."""

import torch
import torch.nn.functional as F
from torch import Tensor

from nemotron_v3.ops._dispatch import wide


def gated_rms_norm(
    y: Tensor, z: Tensor | None, weight: Tensor, group_size: int, eps: float = 1e-5
) -> Tensor:
    v = y.to(wide(y.dtype))
    if z is not None:
        v = v * F.silu(z.to(v.dtype))
    groups = v.unflatten(-1, (-1, group_size))
    inverse_rms = torch.rsqrt(groups.square().mean(-1, keepdim=True) + eps)
    return ((groups * inverse_rms).flatten(-2) * weight.to(v.dtype)).to(y.dtype)
