"""Routed squared-ReLU experts in plain PyTorch.

Letters: T packed tokens, K choices a token, R = T*K routed rows, E experts, X width, F expert
width.

Rows are sorted by expert, each expert multiplies its own run of rows, and every token sums its K
rows in fp32: no atomics, so the result does not depend on the order of execution.
"""

import torch
import torch.nn.functional as F
from torch import Tensor

from nemotron_v3.ops._dispatch import wide


def experts(
    x: Tensor, indices: Tensor, weights: Tensor, up_proj: Tensor, down_proj: Tensor
) -> Tensor:
    K = indices.shape[1]
    order = indices.flatten().argsort(stable=True)  # [R], choices by expert
    rows = x.index_select(0, order // K)  # [R, X]
    counts = torch.bincount(indices.flatten(), minlength=up_proj.shape[0])
    grouped = x.is_cuda and x.dtype == torch.bfloat16
    y = (_grouped if grouped else _looped)(rows, counts, up_proj, down_proj)
    y = y.index_select(0, order.argsort()).unflatten(0, (-1, K))  # [T, K, X]
    dtype = wide(x.dtype)
    return (y.to(dtype) * weights.to(dtype)[..., None]).sum(1).to(x.dtype)


def relu2(h: Tensor) -> Tensor:
    """`relu(h)^2` (So et al. 2021)."""
    return F.relu(h).square()


def _looped(rows: Tensor, counts: Tensor, up_proj: Tensor, down_proj: Tensor) -> Tensor:
    """One matmul an expert; the counts are read once."""
    # unbind, not indexing: its backward writes each expert's gradient once instead of adding E
    # zero-padded copies of the whole stack.
    parts = [
        F.linear(relu2(F.linear(part, up)), down)
        for part, up, down in zip(
            rows.split(counts.tolist()), up_proj.unbind(0), down_proj.unbind(0), strict=True
        )
        if part.shape[0]
    ]
    return torch.cat(parts) if parts else rows


def _grouped(rows: Tensor, counts: Tensor, up_proj: Tensor, down_proj: Tensor) -> Tensor:
    """PyTorch's grouped matmul: the counts stay on the device."""
    ends = counts.cumsum(0).to(torch.int32)
    h = relu2(F.grouped_mm(rows, up_proj.transpose(1, 2), offs=ends))
    return F.grouped_mm(h, down_proj.transpose(1, 2), offs=ends)
