"""Liger Kernel's Triton kernels for training."""

from importlib.metadata import version

from liger_kernel.ops import LigerFusedMoEFunction
from liger_kernel.transformers import LigerFusedLinearCrossEntropyLoss
from torch import Tensor

NAME = f"liger-kernel {version('liger-kernel')}"


def linear_cross_entropy(hidden: Tensor, weight: Tensor, targets: Tensor) -> Tensor:
    return LigerFusedLinearCrossEntropyLoss()(weight, hidden, targets)


def gated_experts(
    x: Tensor, indices: Tensor, weights: Tensor, gate_up: Tensor, down: Tensor
) -> Tensor:
    """SwiGLU experts, `[E, 2 F, X]` and `[E, X, F]`: three products an expert row, not two."""
    return LigerFusedMoEFunction.apply(x, gate_up, down, indices.int(), weights)
