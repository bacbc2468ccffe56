"""Cross entropy in plain PyTorch. Letters: T packed tokens, V vocabulary.

The backward pass keeps the logits, which the caller holds anyway, and computes the softmax again,
straight into the gradient: no other array of that size is ever alive.
"""

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.autograd.function import once_differentiable

from nemotron_v3.ops.common.blocks import row_blocks
from nemotron_v3.ops.common.precision import WIDE


def cross_entropy(logits: Tensor, targets: Tensor, *, ignore_index: int = -100) -> Tensor:
    return _Loss.apply(logits, targets, ignore_index)


class _Loss(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, logits: Tensor, targets: Tensor, ignore_index: int) -> Tensor:
        dtype = WIDE[logits.dtype]
        total = logits.new_zeros((), dtype=dtype)
        for start, end in row_blocks(logits.shape[0], logits.shape[1], logits.device):
            total += F.cross_entropy(
                logits[start:end].to(dtype),
                targets[start:end],
                ignore_index=ignore_index,
                reduction="sum",
            )
        counts = targets != ignore_index
        count = counts.sum().clamp(min=1)
        ctx.save_for_backward(logits, targets, counts, count)
        return total / count

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, dloss: Tensor) -> tuple[Tensor | None, ...]:
        logits, targets, counts, count = ctx.saved_tensors
        weights = counts[:, None] * (dloss / count)  # [T, 1]
        targets = targets.masked_fill(~counts, 0)[:, None]
        dlogits = torch.empty_like(logits, memory_format=torch.contiguous_format)
        for start, end in row_blocks(logits.shape[0], logits.shape[1], logits.device):
            rows = slice(start, end)
            p = torch.softmax(logits[rows].to(weights.dtype), dim=-1).mul_(weights[rows])
            dlogits[rows] = p.scatter_add_(1, targets[rows], -weights[rows])
        return dlogits, None, None
