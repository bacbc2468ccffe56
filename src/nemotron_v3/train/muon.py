"""Muon for the matrices of hidden layers, AdamW for everything else.

Jordan et al. 2024 (kellerjordan.github.io/posts/muon): the momentum of a matrix is replaced by the
nearest orthogonal matrix, which moves all of its directions equally far. Liu et al. 2025 (arXiv
2502.16982): times 0.2 sqrt(max(out, in)) it is as long as an update of AdamW, so that one learning
rate and one weight decay serve both.

PyTorch's own Muon (torch.optim.Muon) takes no stacks of experts, no bf16 weights that are rounded
at random and no matrices that processes share; its products are in bf16, for which many CPUs have
no instructions.

Letters: E experts of a stack; `[..., out, in]` a matrix or a stack of them.
"""

import math
from collections.abc import Callable, Iterable
from typing import Any

import torch
from torch import Tensor, nn
from torch.distributed.tensor import DTensor, Replicate, Shard
from torch.distributed.tensor._utils import compute_local_shape_and_global_offset

from nemotron_v3.train.optimizer import RoundedAdamW, local_part

# x, x^3, x^5 of an odd polynomial that takes each singular value of 0 to 1 to about 1: the steepest
# one at 0, so that five steps are enough (Jordan et al. 2024).
FIRST, THIRD, FIFTH = 3.4445, -4.7750, 2.0315
STEPS = 5
EPS = 1e-7
AT_ONCE = 2**26  # elements of a stack's matrices that are made orthogonal at once
RMS = 0.2  # of an update of AdamW


class Muon(RoundedAdamW):
    """`RoundedAdamW` that moves the parameters of groups with `matrices` by Muon.

    Args:
        params: groups, of which some have `"matrices": True` and parameters `[..., out, in]`.
        momentum: of those.

    Attributes:
        each: runs a function on each parameter, in place of `map`: they may move side by side.
    """

    def __init__(self, params: Iterable[dict[str, Any]], *, momentum: float, **kwargs: Any):
        groups = [{"matrices": False, "momentum": momentum} | group for group in params]
        matrices = (group["params"] for group in groups if group["matrices"])
        self._matrices: set[nn.Parameter] = {p for parameters in matrices for p in parameters}
        self.each: Callable[[Callable[[nn.Parameter], None], list[nn.Parameter]], Any] = map
        super().__init__(groups, **kwargs)

    def _update(self, group: dict[str, Any], bucket: list[nn.Parameter]) -> None:
        if not group["matrices"]:
            super()._update(group, bucket)
            return
        for _ in self.each(lambda p: self._move(group, p), bucket):
            pass

    @torch.no_grad()  # in the thread that runs it
    def _move(self, group: dict[str, Any], p: nn.Parameter) -> None:
        assert p.grad is not None
        state, beta = self._state_of(p), group["momentum"]
        gradient = local_part(p.grad).float() * self.scale
        momentum = local_part(state["momentum"]).lerp_(gradient, 1 - beta)
        whole, own = whole_matrices(p, gradient.lerp(momentum, beta))  # Nesterov's
        update = orthogonal(whole, torch.bfloat16 if p.is_cuda else torch.float32)[own]
        weight = local_part(state.get("master", p)).float()
        weight.mul_(1 - group["lr"] * group["weight_decay"])
        weight.add_(update, alpha=-group["lr"] * RMS * math.sqrt(max(p.shape[-2:])))
        self._write(p, weight)

    def _moments(self, p: nn.Parameter) -> dict[str, Any]:
        if p not in self._matrices:
            return super()._moments(p)
        return {"momentum": torch.zeros_like(p, dtype=torch.float32)}


def orthogonal(matrices: Tensor, dtype: torch.dtype) -> Tensor:
    """The nearest orthogonal matrix of each, up to singular values of 0.7 to 1.2.

    By Newton and Schulz: `X <- a X + b (X X^T) X + c (X X^T)^2 X`, from `X / |X|`.

    Args:
        matrices: `[..., out, in]`; one of 0 stays 0.
        dtype: of the products.

    Returns:
        fp32, of the same shape.
    """
    stack = matrices.flatten(0, -3) if matrices.dim() > 2 else matrices[None]
    made = torch.empty_like(stack, dtype=torch.float32)
    some = max(1, AT_ONCE // max(1, stack[0].numel())) if len(stack) else 1
    for given, place in zip(stack.split(some), made.split(some), strict=True):
        place.copy_(_iterated(given, dtype))
    return made.view(matrices.shape)


def _iterated(stack: Tensor, dtype: torch.dtype) -> Tensor:
    tall = stack.shape[-2] > stack.shape[-1]
    X = stack.mT if tall else stack
    X = (X / X.norm(dim=(-2, -1), keepdim=True).clamp(min=EPS)).to(dtype)
    for _ in range(STEPS):
        A = X @ X.mT
        A = torch.baddbmm(A, A, A, beta=THIRD, alpha=FIFTH)
        X = torch.baddbmm(X, A, X, beta=FIRST)
    return X.mT if tall else X


def whole_matrices(p: Tensor, local: Tensor) -> tuple[Tensor, tuple[slice, ...]]:
    """Of what this process holds of a tensor like `p`, the matrices that it has a part of; and
    where in them that part is.

    A stack that is spread by experts holds whole matrices. What is spread within matrices is
    gathered: every process that has a part of them has to call this.
    """
    everything = (slice(None),) * p.dim()
    if not isinstance(p, DTensor):
        return local, everything
    within = p.dim() - 2
    spread = [isinstance(how, Shard) and how.dim >= within for how in p.placements]
    if not any(spread):
        return local, everything
    mesh, pairs = p.device_mesh, zip(p.placements, spread, strict=True)
    placements = [Replicate() if cut else how for how, cut in pairs]
    mine = DTensor.from_local(
        local, mesh, p.placements, run_check=False, shape=p.shape, stride=p.stride()
    )
    whole = mine.redistribute(placements=placements).to_local()
    shape, first = compute_local_shape_and_global_offset(p.shape, mesh, p.placements)
    _, begin = compute_local_shape_and_global_offset(p.shape, mesh, placements)
    starts = [a - b for a, b in zip(first, begin, strict=True)]
    own = [slice(a, a + size) for a, size in zip(starts, shape, strict=True)]
    return whole, tuple(own)
