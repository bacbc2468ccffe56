"""Experts with low-rank updates in plain PyTorch.

Letters: T packed tokens, K choices a token, R = T*K routed rows, E experts, X width, F expert
width, r rank.

Rows are sorted by expert; each product, thin or not, is one matrix product an expert on a CPU and
one grouped product in all on a GPU. Choices of an expert that is not here come last. The updates
are never added to the stacks: a frozen stack has no gradient, and none is computed.
"""

from functools import partial

import torch
import torch.nn.functional as F
from torch import Tensor

from nemotron_v3.ops.common.precision import WIDE
from nemotron_v3.ops.relu2.op import relu2


def grouped_low_rank(
    x: Tensor,
    indices: Tensor,
    weights: Tensor,
    up_proj: Tensor,
    down_proj: Tensor,
    up_a: Tensor,
    up_b: Tensor,
    down_a: Tensor,
    down_b: Tensor,
    *,
    scale: float = 1.0,
) -> Tensor:
    dtype, K = WIDE[x.dtype], indices.shape[1]
    order = indices.flatten().argsort(stable=True)  # [R], choices by expert
    product = _product(x, indices.flatten(), up_proj.shape[0], (up_proj, down_proj, up_a, down_a))
    # The backward pass of expand sums a token's K rows; that of an index_select would add up rows
    # in memory, in no order on a GPU.
    place = torch.empty_like(order).index_copy_(
        0, order, torch.arange(len(order), device=order.device)
    )
    # What a grouped product leaves in rows of no expert is no number, in its gradients too.
    here = (indices < up_proj.shape[0])[..., None]
    choices = x[:, None].expand(-1, K, -1).where(here, 0).flatten(0, 1)
    rows = x.new_empty(len(order), x.shape[1]).index_copy(0, place, choices)
    h = relu2(_updated(product, rows, up_proj, up_a, up_b, scale))
    y = _updated(product, h, down_proj, down_a, down_b, scale)
    y = y.index_select(0, place).unflatten(0, (-1, K)).where(here, 0)  # [T, K, X]
    return (y.to(dtype) * weights.to(dtype)[..., None]).sum(1).to(x.dtype)


def _updated(product, rows: Tensor, weight: Tensor, a: Tensor, b: Tensor, scale: float) -> Tensor:
    """`(weight + scale b a) row` of each row's expert."""
    return product(rows, weight).add(product(product(rows, a), b), alpha=scale)


def _product(x: Tensor, chosen: Tensor, E: int, stacks: tuple[Tensor, ...]):
    """The function `([R, I], [E, O, I]) -> [R, O]` for rows sorted by expert."""
    counts = torch.zeros(E + 1, dtype=torch.int64, device=x.device)
    counts.scatter_add_(0, chosen, torch.ones_like(chosen))
    if _takes_grouped(x, stacks):
        return partial(_grouped, counts[:E].cumsum(0).to(torch.int32))
    return partial(_by_expert, counts.tolist())


def _takes_grouped(x: Tensor, stacks: tuple[Tensor, ...]) -> bool:
    """On a GPU in bf16; its rows have to start at multiples of 16 bytes."""
    aligned = all(s.shape[1] % 8 == 0 and s.shape[2] % 8 == 0 for s in stacks)
    return x.is_cuda and x.dtype == torch.bfloat16 and aligned


def _grouped(ends: Tensor, rows: Tensor, stack: Tensor) -> Tensor:
    return F.grouped_mm(rows, stack.transpose(1, 2), offs=ends)


def _by_expert(counts: list[int], rows: Tensor, stack: Tensor) -> Tensor:
    # unbind, not indexing: its backward writes each expert's gradient once.
    *runs, elsewhere = rows.split(counts)
    parts = zip(runs, stack.unbind(0), strict=True)
    zeros = elsewhere.new_zeros(len(elsewhere), stack.shape[1])
    return torch.cat([*(F.linear(part, matrix) for part, matrix in parts), zeros])
