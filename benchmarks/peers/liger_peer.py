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
    """Routed experts `down (silu(gate x) * (up x))`; `gate_up` is `[experts, 2 width, hidden]`.

    Its kernels try some 200 forms at the first call, for minutes;
    `LIGER_FUSED_MOE_AUTOTUNE=0` in the environment takes one form of each.
    """
    return LigerFusedMoEFunction.apply(x, gate_up, down, indices.int(), weights)
