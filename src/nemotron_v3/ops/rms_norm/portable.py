"""RMS normalisation in plain PyTorch. Letters: T packed tokens, D width."""

import torch
from torch import Tensor

from nemotron_v3.ops._dispatch import wide


def rms_norm(
    x: Tensor, weight: Tensor, eps: float = 1e-5, out_dtype: torch.dtype | None = None
) -> Tensor:
    x_wide = x.to(wide(x.dtype))
    inverse_rms = torch.rsqrt(x_wide.square().mean(-1, keepdim=True) + eps)
    return (x_wide * inverse_rms * weight.to(x_wide.dtype)).to(out_dtype or x.dtype)
