"""The squared rectifier in plain PyTorch."""

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from nemotron_v3.ops.common.precision import needs_grad


def relu2(x: Tensor) -> Tensor:
    return _Relu2.apply(x) if needs_grad(x) else F.relu(x).square_()


class _Relu2(torch.autograd.Function):
    """Two passes each way, where autograd's own formulas take three for the gradient."""

    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:
        ctx.save_for_backward(x)
        return F.relu(x).square_()

    @staticmethod
    def backward(ctx: Any, dy: Tensor) -> Tensor:
        (x,) = ctx.saved_tensors
        return torch.addcmul(x.new_zeros(()), dy, F.relu(x), value=2)
