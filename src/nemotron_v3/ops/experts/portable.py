"""Routed squared-ReLU experts in plain PyTorch.

Letters: T packed tokens, K choices a token, R = T*K routed rows, E experts, X width, F expert
width; M rows of a tile, n tiles of an expert.

Rows are sorted by expert, each expert multiplies its own run of rows, and every token sums its K
rows in fp32: no atomics, so the result does not depend on the order of execution.

A matrix product may round a row differently when there are more or fewer rows beside it. So an
expert's rows are filled up with zeros to whole tiles of M rows, and every product has M rows: on a
CPU, what a token gets does not depend on where other tokens are routed. M depends on T, K and E
alone. README.md says where this holds, and what it costs.

A choice of expert E, which is not here, has a row behind all others that nothing is computed of.

On a CPU in fp32 larger experts take the runs as they are: `portable_runs.py`.
"""

import torch
import torch.nn.functional as F
from torch import Tensor

from nemotron_v3.ops.common.no_tokens import of_no_tokens
from nemotron_v3.ops.common.precision import WIDE, needs_grad
from nemotron_v3.ops.experts import portable_runs
from nemotron_v3.ops.relu2.portable import relu2

# Without gradients and with at most so many rows an expert on average, each row alone is faster
# than sorting them: a few tokens of a decode step.
ROWS_ALONE = 2
TILE = 32  # rows of the largest tile: few enough to waste little, enough to keep a core busy


def experts(
    x: Tensor, indices: Tensor, weights: Tensor, up_proj: Tensor, down_proj: Tensor
) -> Tensor:
    K, E = indices.shape[1], up_proj.shape[0]
    dtype = WIDE[x.dtype]
    few = 0 < indices.numel() <= ROWS_ALONE * E and x.device.type == "cpu"
    if few and not needs_grad(x, weights, up_proj, down_proj):
        y = _row_by_row(x, indices.flatten().tolist(), up_proj, down_proj).unflatten(0, (-1, K))
        return (y.to(dtype) * weights.to(dtype)[..., None]).sum(1).to(x.dtype)
    if portable_runs.takes(x, indices.numel(), up_proj):
        return portable_runs.experts(x, indices, weights, up_proj, down_proj)
    # A grouped product on a GPU works in tiles of its own.
    grouped = x.is_cuda and x.dtype == torch.bfloat16
    M = 1 if grouped else tile_rows(indices.numel(), E)
    tiles, place = _places(indices.flatten(), E, M)
    if grouped:
        here = (indices < E)[..., None]
        y = _grouped(_scatter(x, place, K, indices.numel(), here), tiles[:E], up_proj, down_proj)
        y = y.index_select(0, place).unflatten(0, (-1, K)).where(here, 0)
    else:
        counts = tiles.tolist()
        rows = _scatter(x, place, K, M * sum(counts))
        tiled = rows.view(sum(counts), M, x.shape[1])
        y = _tiled(tiled, counts, up_proj, down_proj).flatten(0, 1)
        y = y.index_select(0, place).unflatten(0, (-1, K))  # [T, K, X]
    return (y.to(dtype) * weights.to(dtype)[..., None]).sum(1).to(x.dtype)


def _row_by_row(x: Tensor, chosen: list[int], up_proj: Tensor, down_proj: Tensor) -> Tensor:
    """`[T, X]` and the experts of the T*K choices -> `[R, X]`."""
    K = len(chosen) // x.shape[0]
    up, down = up_proj.transpose(1, 2), down_proj.transpose(1, 2)
    h = x.new_empty(len(chosen), up_proj.shape[1])
    y = x.new_empty(len(chosen), x.shape[1])
    tokens, rows, outs = (t.unsqueeze(1).unbind(0) for t in (x, h, y))  # each [1, width]
    for r, (e, row) in enumerate(zip(chosen, rows, strict=True)):
        if e < len(up):
            torch.mm(tokens[r // K], up[e], out=row)
    h.relu_().square_()
    for e, row, out in zip(chosen, rows, outs, strict=True):
        if e < len(down):
            torch.mm(row, down[e], out=out)
        else:
            out.zero_()
    return y


def tile_rows(rows: int, experts: int) -> int:
    """M: the largest power of two that a usual expert fills, up to `TILE`."""
    usual = max(1, rows // experts)
    return min(TILE, 1 << (usual.bit_length() - 1))


def _places(chosen: Tensor, E: int, M: int) -> tuple[Tensor, Tensor]:
    """How many tiles each expert has, and those elsewhere, `[E + 1]`; and the row of each choice
    among all tiles `[R]`."""
    counts = torch.bincount(chosen, minlength=E + 1)
    tiles = (counts + M - 1) // M
    first_row = (tiles.cumsum(0) - tiles) * M
    first_choice = counts.cumsum(0) - counts
    order = chosen.argsort(stable=True)  # choices by expert
    shift = (first_row - first_choice).index_select(0, chosen.index_select(0, order))
    in_order = torch.arange(len(chosen), device=chosen.device) + shift
    return tiles, torch.empty_like(order).index_copy_(0, order, in_order)


def _scatter(x: Tensor, place: Tensor, K: int, rows: int, here: Tensor | None = None) -> Tensor:
    """`[T, X]` -> `[rows, X]`: each token at its K places, zeros between and where not `here`.

    The backward pass gathers and sums K rows a token, where that of an `index_select` would add up
    rows in memory.
    """
    choices = x[:, None].expand(-1, K, -1)
    # What a grouped product leaves in rows of no expert is no number, in its gradients too.
    choices = (choices if here is None else choices.where(here, 0)).flatten(0, 1)
    return x.new_zeros(rows, x.shape[1]).index_copy(0, place, choices)


def _tiled(tiles: Tensor, counts: list[int], up_proj: Tensor, down_proj: Tensor) -> Tensor:
    """`[tiles, M, X]` -> the same, one batched product an expert and matrix, zeros elsewhere."""
    *counts, elsewhere = counts
    zeros = tiles.new_zeros(elsewhere, *tiles.shape[1:])
    if not sum(counts):
        return of_no_tokens(zeros, tiles, up_proj, down_proj)
    # unbind, not indexing: its backward writes each expert's gradient once instead of adding E
    # zero-padded copies of the whole stack.
    parts = [
        _TiledLinear.apply(relu2(_TiledLinear.apply(part, up)), down)
        for part, up, down in zip(
            tiles[: sum(counts)].split(counts), up_proj.unbind(0), down_proj.unbind(0), strict=True
        )
        if part.shape[0]
    ]
    return torch.cat([*parts, zeros] if elsewhere else parts)


class _TiledLinear(torch.autograd.Function):
    """`[n, M, I] x [O, I] -> [n, M, O]`, each tile a product of its own shape.

    Autograd's own formula would make the weight's gradient tile by tile and then add n of them.
    """

    @staticmethod
    def forward(ctx, x: Tensor, weight: Tensor) -> Tensor:
        ctx.save_for_backward(x, weight)
        return torch.bmm(x, weight.t().expand(x.shape[0], -1, -1))

    @staticmethod
    def backward(ctx, grad: Tensor) -> tuple[Tensor | None, Tensor | None]:
        x, weight = ctx.saved_tensors
        grad_x = _TiledLinear.apply(grad, weight.t()) if ctx.needs_input_grad[0] else None
        grad_weight = None
        if ctx.needs_input_grad[1]:
            grad_weight = grad.flatten(0, 1).t() @ x.flatten(0, 1)
        return grad_x, grad_weight


def _grouped(rows: Tensor, counts: Tensor, up_proj: Tensor, down_proj: Tensor) -> Tensor:
    """PyTorch's grouped matmul: the counts stay on the device."""
    ends = counts.cumsum(0).to(torch.int32)
    h = relu2(F.grouped_mm(rows, up_proj.transpose(1, 2), offs=ends))
    return F.grouped_mm(h, down_proj.transpose(1, 2), offs=ends)
