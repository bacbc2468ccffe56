"""The host's half of `skinny_linear` in Triton (README.md).

Letters: R rows, m outputs, n inputs.
"""

from typing import NamedTuple, Self

import torch
import triton
from torch import Tensor

from nemotron_v3.ops.common.early import early
from nemotron_v3.ops.common.host import on_device_of_first, power_of_two, shared_memory
from nemotron_v3.ops.common.low_rank import LowRank
from nemotron_v3.ops.skinny_linear.kernels.products import Mode, group_norm_kernel, linear_kernel
from nemotron_v3.ops.skinny_linear.kernels.thin import thin_kernel
from nemotron_v3.ops.skinny_linear.norm import Norm

Updates = tuple[LowRank | None, ...]

LARGEST_GROUP = 1024  # of a norm that the product of one row does itself
THIN_RANKS = 2  # that a program of a thin product has


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
    low_rank: Updates | None,
    out: Tensor,
) -> Tensor:
    if len(x):
        _linear(x, weights, biases, norm, residual, low_rank, out)
    return out


def rank_block(rank: int, dtype: torch.dtype, R: int) -> int:
    """A rank filled up to what a product of tensor cores takes; 0 for none.

    In 16 bits Triton 3.6 computes products over fewer than 64 wrongly in some loops.
    """
    if rank == 0 or R == 1:
        return power_of_two(rank) if rank else 0
    return max(16 if dtype == torch.float32 else 64, power_of_two(rank))


@on_device_of_first
def _linear(
    x: Tensor,
    weights: tuple[Tensor, ...],
    biases: tuple[Tensor | None, ...],
    norm: Norm | None,
    residual: Tensor | None,
    low_rank: Updates | None,
    out: Tensor,
) -> None:
    R, n = x.shape
    m = [len(weight) for weight in weights]
    kind = weights[0].dtype
    blocks = blocks_of(R, sum(m), kind, shared_memory(x.device))
    group = 0 if norm is None or norm.group in (0, n) else norm.group
    whole = low_rank is None or power_of_two(n) == n
    if group and R == 1 and power_of_two(group) == group <= LARGEST_GROUP and whole:
        blocks = blocks._replace(n=group)
    elif group:
        x, norm, group = _by_group(x, norm, kind), None, 0
    updates = low_rank or (None,) * len(weights)
    ranks = [0 if update is None else len(update.a) for update in updates]
    thin = _thin(x, updates, ranks, norm, group) if any(ranks) else None
    b_0, b_1, b_2 = _three(_of_any(updates, "b"))
    rank_0, rank_1, rank_2 = (*ranks, 0, 0)[:3]
    kind_b = kind if b_0 is None else b_0.dtype
    w_0, w_1, w_2 = _three(weights)
    bias_0, bias_1, bias_2 = _three(biases)
    m_0, m_1, m_2 = (*m, 0, 0)[:3]
    blocks_0, blocks_1, blocks_2 = (triton.cdiv(size, blocks.m) for size in (m_0, m_1, m_2))
    mode = Mode(
        NORM=norm is not None,
        GROUP=group,
        BIAS=bias_0 is not None,
        RESIDUAL=residual is not None,
        PARTS=len(weights),
        RANK=rank_block(max(ranks), kind_b, R),
        EVEN=n % blocks.n == 0,
    )
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
        b_0=b_0,
        b_1=b_1,
        b_2=b_2,
        thin=thin,
        R=R,
        N=n,
        m_0=m_0,
        m_1=m_1,
        m_2=m_2,
        rank_0=rank_0,
        rank_1=rank_1,
        rank_2=rank_2,
        blocks_0=blocks_0,
        blocks_1=blocks_1,
        eps=0.0 if norm is None else norm.eps,
        stride_x=x.stride(0),
        stride_out=out.stride(0),
        MODE=mode,
        BLOCKS=blocks,
        num_warps=blocks.warps,
        **early(x.device),
    )


def _three(tensors: tuple[Tensor | None, ...]) -> tuple[Tensor | None, ...]:
    """With the first in the places of those that are not there."""
    return (*tensors, *tensors[:1] * (3 - len(tensors)))


def _of_any(updates: Updates, name: str) -> tuple[Tensor | None, ...]:
    """A matrix of each update; where one has none, another's, of which nothing is read."""
    given = [None if update is None else getattr(update, name) for update in updates]
    one = next((matrix for matrix in given if matrix is not None), None)
    return tuple(one if matrix is None else matrix for matrix in given)


def _thin(x: Tensor, updates: Updates, ranks: list[int], norm: Norm | None, group: int) -> Tensor:
    """fp32 `[R, sum of ranks]`."""
    R, n = x.shape
    thin = torch.empty(R, sum(ranks), dtype=torch.float32, device=x.device)
    a_0, a_1, a_2 = _three(_of_any(updates, "a"))
    scales = [0.0 if update is None else float(update.scale) for update in updates]
    scale_0, scale_1, scale_2 = (*scales, 0.0, 0.0)[:3]
    rank_0, rank_1, rank_2 = (*ranks, 0, 0)[:3]
    blocks = [triton.cdiv(rank, THIN_RANKS) for rank in (*ranks, 0, 0)]
    thin_kernel[sum(blocks), R](
        x=x,
        gain=None if norm is None else norm.weight,
        a_0=a_0,
        a_1=a_1,
        a_2=a_2,
        thin=thin,
        N=n,
        rank_0=rank_0,
        rank_1=rank_1,
        rank_2=rank_2,
        scale_0=scale_0,
        scale_1=scale_1,
        scale_2=scale_2,
        blocks_0=blocks[0],
        blocks_1=blocks[1],
        eps=0.0 if norm is None else norm.eps,
        stride_x=x.stride(0),
        NORM=norm is not None,
        GROUP=group,
        PARTS=len(updates),
        BLOCK_M=THIN_RANKS,
        ALL_N=power_of_two(n),
        num_warps=8,
        **early(x.device),
    )
    return thin


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
