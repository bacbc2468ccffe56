"""Cross entropy in plain PyTorch. Letters: T packed tokens, V vocabulary."""

import torch.nn.functional as F
from torch import Tensor

from nemotron_v3.ops._dispatch import wide


def cross_entropy(logits: Tensor, targets: Tensor, *, ignore_index: int = -100) -> Tensor:
    total = F.cross_entropy(
        logits.to(wide(logits.dtype)), targets, ignore_index=ignore_index, reduction="sum"
    )
    return total / (targets != ignore_index).sum().clamp(min=1)
