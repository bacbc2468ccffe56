"""The host's half of `skinny_linear` in Triton (README.md).

Letters: R rows, m outputs, n inputs.
"""

from typing import NamedTuple, Self

import torch
import triton
from torch import Tensor

from nemotron_v3.ops.common.early import early
from nemotron_v3.ops.common.host import on_device_of_first, power_of_two, shared_memory
from nemotron_v3.ops.skinny_linear.kernels.products import group_norm_kernel, linear_kernel
from nemotron_v3.ops.skinny_linear.norm import Norm

LARGEST_GROUP = 1024  # of a norm that the product of one row does itself


class Blocks(NamedTuple):
    """A program's outputs, inputs at a time, and rows; its warps, and how many loads are under way.

    One row has no use for shared memory; of more, all loads under way lie there.
    """

    m: int
    n: int
    r: int
    warps: int
    stages: int

    def shared(self, weight: int, x: int) -> int:
        """Bytes that the loads under way take, and the rows once more for a product.

        Args:
            weight, x: bytes of an element.
        """
        return self.stages * self.n * (self.m * weight + self.r * x) + self.n * self.r * x

    def within(self, most: int, weight: int, x: int) -> Self:
        """With fewer loads under way, or fewer inputs at a time, where shared memory is short."""
        blocks = self
        while blocks.shared(weight, x) > most:
            if blocks.stages > 2:
                blocks = blocks._replace(stages=blocks.stages - 1)
            elif blocks.n > 32:
                blocks = blocks._replace(n=blocks.n // 2, stages=self.stages)
            else:
                break
        return blocks


def blocks_of(R: int, m: int, dtype: torch.dtype, shared: int) -> Blocks:
    """How a product of R rows is cut; measured on an H200.

    What counts is how many bytes of the weight are on their way at a time: 32 KB a multiprocessor
    at least. Norms and rows are read once a program, so large weights have large blocks.

    Args:
        shared: bytes of shared memory that a program may have.
    """
    if dtype == torch.float32:
        if R == 1:
            return Blocks(8, 256, 1, 4, 3)
        return Blocks(32, 32, min(max(power_of_two(R), 16), 32), 4, 2)
    if R == 1:
        return Blocks(16, 256, 1, 4, 4) if m >= 4096 else Blocks(8, 512, 1, 4, 4)
    if R <= 16:
        blocks = Blocks(128, 128, 16, 8, 5) if m >= 8192 else Blocks(64, 256, 16, 4, 4)
    elif R <= 32:
        blocks = Blocks(128, 128, 32, 8, 4) if m >= 8192 else Blocks(64, 128, 32, 4, 5)
    else:
        blocks = Blocks(64, 64, 64, 4, 4) if R <= 64 else Blocks(64, 64, 128, 8, 3)
    return blocks.within(shared, 2, 4)  # x is fp32 behind a mixer


def skinny_linear(
    x: Tensor,
    weights: tuple[Tensor, ...],
    biases: tuple[Tensor | None, ...],
    *,
    norm: Norm | None,
    residual: Tensor | None,
    out: Tensor,
) -> Tensor:
    if len(x):
        _linear(x, weights, biases, norm, residual, out)
    return out


@on_device_of_first
def _linear(
    x: Tensor,
    weights: tuple[Tensor, ...],
    biases: tuple[Tensor | None, ...],
    norm: Norm | None,
    residual: Tensor | None,
    out: Tensor,
) -> None:
    R, n = x.shape
    m = [len(weight) for weight in weights]
    kind = weights[0].dtype
    blocks = blocks_of(R, sum(m), kind, shared_memory(x.device))
    group = 0 if norm is None or norm.group in (0, n) else norm.group
    if group and R == 1 and power_of_two(group) == group <= LARGEST_GROUP:
        blocks = blocks._replace(n=group)
    elif group:
        x, norm, group = _by_group(x, norm, kind), None, 0
    w_0, w_1, w_2 = _three(weights)
    bias_0, bias_1, bias_2 = _three(biases)
    m_0, m_1, m_2 = (*m, 0, 0)[:3]
    blocks_0, blocks_1, blocks_2 = (triton.cdiv(size, blocks.m) for size in (m_0, m_1, m_2))
    linear_kernel[blocks_0 + blocks_1 + blocks_2, triton.cdiv(R, blocks.r)](
        x=x,
        w_0=w_0,
        w_1=w_1,
        w_2=w_2,
        bias_0=bias_0,
        bias_1=bias_1,
        bias_2=bias_2,
        gain=None if norm is None else norm.weight,
        residual=residual,
        out=out,
        R=R,
        N=n,
        m_0=m_0,
        m_1=m_1,
        m_2=m_2,
        blocks_0=blocks_0,
        blocks_1=blocks_1,
        eps=0.0 if norm is None else norm.eps,
        stride_x=x.stride(0),
        stride_out=out.stride(0),
        NORM=norm is not None,
        GROUP=group,
        BIAS=bias_0 is not None,
        RESIDUAL=residual is not None,
        PARTS=len(weights),
        BLOCK_M=blocks.m,
        BLOCK_N=blocks.n,
        BLOCK_R=blocks.r,
        EVEN=n % blocks.n == 0,
        STAGES=blocks.stages,
        num_warps=blocks.warps,
        **early(x.device),
    )


def _three(tensors: tuple[Tensor | None, ...]) -> tuple[Tensor | None, ...]:
    """With the first in the places of those that are not there."""
    return (*tensors, *tensors[:1] * (3 - len(tensors)))


def _by_group(x: Tensor, norm: Norm, dtype: torch.dtype) -> Tensor:
    R, n = x.shape
    out = torch.empty(R, n, dtype=dtype, device=x.device)
    group_norm_kernel[R, n // norm.group](
        x=x,
        gain=norm.weight,
        out=out,
        eps=norm.eps,
        stride_x=x.stride(0),
        stride_out=n,
        SIZE=norm.group,
        BLOCK=power_of_two(norm.group),
        num_warps=4,
        **early(x.device),
    )
    return out
