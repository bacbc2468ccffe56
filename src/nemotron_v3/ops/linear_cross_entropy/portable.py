"""Linear cross entropy in plain PyTorch, a chunk of tokens at a time.

Letters: T packed tokens, D width, V vocabulary. A chunk's logits become their own gradient in
place and are multiplied into the gradients of `hidden` and `weight` before the next chunk's logits
take their memory (README.md, 'How the fast forms compute it').
"""

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from nemotron_v3.ops.common.blocks import row_blocks
from nemotron_v3.ops.common.precision import WIDE, needs_grad
from nemotron_v3.ops.linear_cross_entropy._chunks import chunk_rows, sum_dtype


def linear_cross_entropy(
    hidden: Tensor,
    weight: Tensor,
    targets: Tensor,
    *,
    ignore_index: int = -100,
    z_loss: float = 0.0,
    per_token: bool = False,
) -> Tensor | tuple[Tensor, Tensor, Tensor]:
    wanted = needs_grad(hidden), needs_grad(weight)
    results = _Loss.apply(hidden, weight, targets, ignore_index, z_loss, wanted)
    return results if per_token else results[0]


def linear_log_probabilities(
    hidden: Tensor, weight: Tensor, targets: Tensor, *, ignore_index: int = -100
) -> tuple[Tensor, Tensor]:
    return _LogProbabilities.apply(hidden, weight, targets, ignore_index)


class _Loss(torch.autograd.Function):
    """The gradients of a sum over tokens are made with the loss; the backward pass scales them."""

    @staticmethod
    def forward(
        ctx: Any,
        hidden: Tensor,
        weight: Tensor,
        targets: Tensor,
        ignore_index: int,
        z_loss: float,
        wanted: tuple[bool, bool],
    ) -> tuple[Tensor, Tensor, Tensor]:
        counted = targets != ignore_index
        gradients = _Gradients(hidden, weight, *wanted)
        log_p, log_z = hidden.new_empty((2, len(targets)), dtype=WIDE[hidden.dtype])
        for rows, logits in _chunks(hidden, weight):
            for block in _softmax(rows, logits, targets, counted, log_p, log_z):
                if gradients.wanted:
                    ones = block.counted.to(log_p.dtype)
                    block.to_gradient(ones * (1 + 2 * z_loss * block.log_z), ones)
            gradients.add(rows, logits)
        count = counted.sum().clamp(min=1)
        ctx.save_for_backward(count, gradients.hidden, gradients.weight)
        ctx.kinds = hidden.dtype, weight.dtype
        loss = (z_loss * log_z.square() - log_p).sum() / count
        ctx.mark_non_differentiable(log_p, log_z)
        ctx.set_materialize_grads(False)
        return loss, log_p, log_z

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, dloss: Tensor, *_: Any) -> tuple[Tensor | None, ...]:
        if dloss is None:
            return (None,) * 6
        count, *sums = ctx.saved_tensors
        pairs = zip(sums, ctx.kinds, strict=True)
        return *(_scaled(total, dloss / count, dtype) for total, dtype in pairs), *(None,) * 4


class _LogProbabilities(torch.autograd.Function):
    """The cotangent of each token is known in the backward pass only: it computes logits again."""

    @staticmethod
    def forward(
        ctx: Any, hidden: Tensor, weight: Tensor, targets: Tensor, ignore_index: int
    ) -> tuple[Tensor, Tensor]:
        counted = targets != ignore_index
        log_p, log_z = hidden.new_empty((2, len(targets)), dtype=WIDE[hidden.dtype])
        for rows, logits in _chunks(hidden, weight):
            for _ in _softmax(rows, logits, targets, counted, log_p, log_z):
                pass
        ctx.save_for_backward(hidden, weight, targets, counted)
        return log_p, log_z

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, dlog_p: Tensor, dlog_z: Tensor) -> tuple[Tensor | None, ...]:
        hidden, weight, targets, counted = ctx.saved_tensors
        gradients = _Gradients(hidden, weight, *ctx.needs_input_grad[:2])
        again = hidden.new_empty((2, len(targets)), dtype=dlog_p.dtype)
        for rows, logits in _chunks(hidden, weight):
            for block in _softmax(rows, logits, targets, counted, *again):
                of_p = block.counted * dlog_p[block.rows]
                block.to_gradient(block.counted * dlog_z[block.rows] - of_p, -of_p)
            gradients.add(rows, logits)
        dweight = gradients.weight
        return gradients.hidden, None if dweight is None else dweight.to(weight.dtype), None, None


class _Gradients:
    """Gradients of `hidden` and `weight` from those of the logits, a chunk after the other."""

    def __init__(self, hidden: Tensor, weight: Tensor, of_hidden: bool, of_weight: bool):
        T, V = len(hidden), len(weight)
        chunks = -(-T // chunk_rows(T, V, hidden.dtype, hidden.device))
        self.wanted = of_hidden or of_weight
        self._inputs = hidden, weight
        self.hidden = self.weight = None
        if of_hidden:
            self.hidden = hidden.new_empty(hidden.shape)
        if of_weight:
            self.weight = weight.new_zeros(weight.shape, dtype=sum_dtype(weight, chunks))

    def add(self, rows: slice, dlogits: Tensor) -> None:
        hidden, weight = self._inputs
        if self.hidden is not None:
            torch.mm(dlogits, weight, out=self.hidden[rows])
        if self.weight is not None:
            if self.weight.dtype == weight.dtype:
                self.weight.addmm_(dlogits.t(), hidden[rows])
            else:
                self.weight.add_(dlogits.t() @ hidden[rows])


@dataclass
class _Softmax:
    """Some rows of a chunk that fit a cache together.

    Attributes:
        rows: which tokens.
        logits: `[r, V]`, whose place the gradient takes.
        x: `exp(logits - largest)`; the same memory where the logits are wide already.
        total: `[r]`, the sum of `x`.
        log_p, log_z: `[r]`, 0 where `counted` is not set.
    """

    rows: slice
    logits: Tensor
    x: Tensor
    targets: Tensor
    counted: Tensor
    total: Tensor
    log_p: Tensor
    log_z: Tensor

    def to_gradient(self, a: Tensor, b: Tensor) -> None:
        """`a softmax - b onehot(target)` in place of the logits; a and b `[r]`."""
        self.x.mul_((a / self.total)[:, None])
        self.x.scatter_add_(1, self.targets[:, None], -b[:, None])
        if self.x is not self.logits:
            self.logits.copy_(self.x)


def _chunks(hidden: Tensor, weight: Tensor) -> Iterator[tuple[slice, Tensor]]:
    """The rows and the logits of every chunk, which share one memory."""
    T, V = len(hidden), len(weight)
    step = chunk_rows(T, V, hidden.dtype, hidden.device)
    memory = hidden.new_empty(min(step, T), V)
    for start in range(0, T, step):
        rows = slice(start, min(T, start + step))
        logits = memory[: rows.stop - start]
        torch.mm(hidden[rows], weight.t(), out=logits)
        yield rows, logits


def _softmax(
    rows: slice, logits: Tensor, targets: Tensor, counted: Tensor, log_p: Tensor, log_z: Tensor
) -> Iterator[_Softmax]:
    """A chunk's blocks of rows; what is found of them is written into `log_p` and `log_z` `[T]`."""
    for start, end in row_blocks(logits.shape[0], logits.shape[1], logits.device):
        here = slice(rows.start + start, rows.start + end)
        of_block, on = logits[start:end], counted[here]
        x = of_block.to(log_p.dtype)
        largest = x.amax(1)
        x.sub_(largest[:, None])
        chosen = targets[here].masked_fill(~on, 0)
        shifted = x.gather(1, chosen[:, None])[:, 0]
        total = x.exp_().sum(1)
        log_sum = total.log()
        log_p[here] = (shifted - log_sum).masked_fill_(~on, 0)
        log_z[here] = (largest + log_sum).masked_fill_(~on, 0)
        x = of_block if x.dtype == of_block.dtype else x
        yield _Softmax(here, of_block, x, chosen, on, total, log_p[here], log_z[here])


def _scaled(total: Tensor | None, scale: Tensor, dtype: torch.dtype) -> Tensor | None:
    """`total * scale` in `dtype`. The scale stays wide: a product with it in 16 bits would round it
    first, and bend every gradient alike."""
    if total is None:
        return None
    if total.dtype == scale.dtype:
        return (total * scale).to(dtype)
    out = total.new_empty(total.shape, dtype=dtype)
    for start, end in row_blocks(total.shape[0], total.shape[1], total.device):
        out[start:end] = total[start:end].to(scale.dtype) * scale
    return out
