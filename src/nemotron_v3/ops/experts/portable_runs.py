"""Routed squared-ReLU experts on a CPU in fp32: an expert's rows at once, by oneDNN.

Letters: T packed tokens, K choices a token, R = T*K routed rows, E experts, X width, F expert
width; r rows of one expert. In an expert, `u = x up^T`, `h = relu(u)^2`, `y = h down^T`.

oneDNN rounds a row alike in any company, so nothing is filled up: what a token gets does not depend
on where other tokens are routed. One expert's rows go through all passes before the next expert's:
they stay in a cache. What is kept for the backward pass of each row is `relu(u)` alone.
"""

from collections.abc import Iterator
from itertools import accumulate
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.autograd.function import once_differentiable

from nemotron_v3.ops.common.blocks import Workspace
from nemotron_v3.ops.common.onednn import SMALLEST, onednn_works, product, rows_are_alike


def takes(x: Tensor, rows: int, up_proj: Tensor) -> bool:
    """Whether this form can take these tensors and is faster: by their sizes, not the choices."""
    E, width, X = up_proj.shape
    return (
        x.is_cpu
        and x.dtype == up_proj.dtype == torch.float32
        and rows * width * X >= SMALLEST * E
        and onednn_works()
        and rows_are_alike(X, width, torch.get_num_threads())
        and rows_are_alike(width, X, torch.get_num_threads())
    )


def experts(
    x: Tensor, indices: Tensor, weights: Tensor, up_proj: Tensor, down_proj: Tensor
) -> Tensor:
    order = indices.flatten().argsort(stable=True)  # choices by expert
    counts = torch.bincount(indices.flatten(), minlength=up_proj.shape[0] + 1).tolist()
    # Choices of an expert that is not here come last, and are in no run.
    return _Experts.apply(x, weights.float(), up_proj, down_proj, order, counts[:-1])


class _Experts(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        x: Tensor,
        weights: Tensor,
        up_proj: Tensor,
        down_proj: Tensor,
        order: Tensor,
        counts: list[int],
    ) -> Tensor:
        runs = _Runs(weights, order, counts)
        rows = x.new_empty(len(order), x.shape[1])
        rows[runs.end :] = 0
        kept = []
        for e, run, tokens in runs:
            # Not oneDNN's own relu: it turns NaN into 0.
            positive = F.relu_(_product(x.index_select(0, tokens), up_proj[e]))
            rows[run] = _product(positive.square(), down_proj[e])
            kept.append(positive)
        ctx.save_for_backward(x, weights, up_proj, down_proj, order, *kept)
        ctx.counts = counts
        return runs.sums(rows, weights)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, dy: Tensor) -> tuple[Tensor | None, ...]:
        x, weights, up_proj, down_proj, order, *kept = ctx.saved_tensors
        of_x, of_weights, of_up, of_down, *_ = ctx.needs_input_grad
        runs, work = _Runs(weights, order, ctx.counts), Workspace(x, x.dtype)
        weight_of_row = weights.flatten().index_select(0, order)[:, None]
        dweight_of_row = torch.empty_like(weight_of_row[:, 0])
        dup = torch.empty_like(up_proj) if of_up else None
        ddown = torch.empty_like(down_proj) if of_down else None
        for gradient in (dup, ddown):
            if gradient is not None:
                for e in runs.empty:
                    gradient[e] = 0
        dx_rows = x.new_empty(len(order), x.shape[1]) if of_x else None
        for gradient in (dx_rows, dweight_of_row):
            if gradient is not None:
                gradient[runs.end :] = 0
        for (e, run, tokens), positive in zip(runs, kept, strict=True):
            dy_run = dy.index_select(0, tokens)
            scale = weight_of_row[run]
            if ddown is not None:
                h = torch.mul(positive, positive, out=work("h", *positive.shape)).mul_(scale)
                torch.mm(dy_run.t(), h, out=ddown[e])
            # The gradient of h for a weight of 1; times relu(u) it gives those of both.
            dh = _product(dy_run, down_proj[e].t()).mul_(positive)
            dweight_of_row[run] = torch.linalg.vecdot(dh, positive)
            if dup is None and dx_rows is None:
                continue
            du = dh.mul_(2 * scale)
            if dup is not None:
                torch.mm(du.t(), x.index_select(0, tokens), out=dup[e])
            if dx_rows is not None:
                dx_rows[run] = _product(du, up_proj[e].t())
        dx = None if dx_rows is None else runs.sums(dx_rows)
        dweights = None
        if of_weights:
            dweights = torch.empty_like(dweight_of_row).index_copy_(0, order, dweight_of_row)
            dweights = dweights.view(weights.shape)
        return dx, dweights, dup, ddown, None, None


class _Runs:
    """The runs of rows of each expert that has any: `(expert, its rows, their tokens)`.

    Attributes:
        empty: the experts that have none.
        end: the rows of all of them; what follows are choices of experts that are not here.
    """

    def __init__(self, weights: Tensor, order: Tensor, counts: list[int]):
        self._order, (_, self._K) = order, weights.shape
        self.end = sum(counts)
        tokens = (order[: self.end] // self._K).split(counts)
        ends = accumulate(counts)
        self.empty = [e for e, count in enumerate(counts) if not count]
        self._runs = [
            (e, slice(end - count, end), tokens[e])
            for e, (count, end) in enumerate(zip(counts, ends, strict=True))
            if count
        ]

    def __iter__(self) -> Iterator[tuple[int, slice, Tensor]]:
        return iter(self._runs)

    def sums(self, rows: Tensor, weights: Tensor | None = None) -> Tensor:
        """`[R, X]` -> `[T, X]`: each token's K rows, times their weights, in the order of k."""
        place = torch.empty_like(self._order)
        place[self._order] = torch.arange(len(place))
        # One pass, where gathering, multiplying and adding are three over K times the memory.
        return F.embedding_bag(
            place.view(-1, self._K), rows, mode="sum", per_sample_weights=weights
        )


def _product(x: Tensor, weight: Tensor) -> Tensor:
    """A row by itself would be rounded in another way than among others."""
    return product(x, weight) if len(x) > 1 else product(x.expand(2, -1), weight)[:1]
