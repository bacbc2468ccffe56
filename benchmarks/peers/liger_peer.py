"""Liger Kernel's Triton kernels for training."""

from importlib.metadata import version

from liger_kernel.transformers import LigerFusedLinearCrossEntropyLoss
from torch import Tensor

NAME = f"liger-kernel {version('liger-kernel')}"


def linear_cross_entropy(hidden: Tensor, weight: Tensor, targets: Tensor) -> Tensor:
    return LigerFusedLinearCrossEntropyLoss()(weight, hidden, targets)
