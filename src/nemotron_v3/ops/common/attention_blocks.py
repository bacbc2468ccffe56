"""Attention of one document's last tokens to all of it, a block of keys at a time.

PyTorch's fast kernels know two masks: none, and a causal one that begins at the first key. Queries
that stand behind other tokens need neither alone: they see all keys before them, and of their own
the causal half. So the keys are cut into blocks, each is attended to by itself, and the results are
joined by the logarithms of their softmax' sums (Milakov and Gimelshein 2018, arXiv 1805.02867):

    L = log sum_b e^{l_b},   y = sum_b e^{l_b - L} y_b.

The backward pass of a block needs nothing of the others but L and y: a kernel that is given them in
the place of its own computes the block's part of all gradients.

Letters: n queries, m keys before them, H query heads, J key/value heads, P head width.
"""

from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from nemotron_v3.ops.common.precision import WIDE

aten = torch.ops.aten


class Block(NamedTuple):
    """Keys `start` to `end`; all are seen, or the causal half of the queries' own."""

    start: int
    end: int
    is_causal: bool


def takes(q: Tensor) -> bool:
    """Whether PyTorch's kernel for CPUs attends to blocks for such queries.

    PyTorch's kernels for GPUs do not: in a model of 32 query and 2 key heads their gradients of q,
    k and v were wrong by up to 87 %, while each kernel alone, of 8 and 2 heads, held the rule.
    """
    return q.is_cpu and q.is_floating_point() and not torch.compiler.is_compiling()


def attend_after(q: Tensor, k: Tensor, v: Tensor, scale: float | None = None) -> Tensor:
    """The last n tokens of one document attend to all of it.

    Args:
        q: `[n, H, P]`. k, v: `[m + n, J, P]`: the queries' own are the last.
        scale: of the scores, by default `P ** -0.5`.

    Returns:
        `[n, H, P]`.
    """
    scale = float(q.shape[-1] ** -0.5 if scale is None else scale)
    return _After.apply(q, k, v, scale, blocks_of(q.shape[0], k.shape[0]))


def blocks_of(queries: int, keys: int) -> tuple[Block, ...]:
    """How the keys of a document are cut for its last queries."""
    before = keys - queries
    own = Block(before, keys, is_causal=True)
    return (Block(0, before, is_causal=False), own) if before else (own,)


def _by_head(t: Tensor) -> Tensor:
    """`[tokens, heads, P]` -> `[1, heads, tokens, P]`, a view."""
    return t.transpose(0, 1)[None]


class _After(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, q: Tensor, k: Tensor, v: Tensor, scale: float, blocks: tuple[Block, ...]
    ) -> Tensor:
        joined = total = None
        for block in blocks:
            here = slice(block.start, block.end)
            heads = _by_head(q), _by_head(k[here]), _by_head(v[here])
            # [1, H, n, P], [1, H, n]
            part, logs = aten._scaled_dot_product_flash_attention_for_cpu(
                *heads, 0.0, block.is_causal, scale=scale
            )
            if joined is None or total is None:
                joined, total = part.to(WIDE[q.dtype]), logs
                continue
            both = torch.logaddexp(total, logs)
            joined *= (total - both).exp()[..., None].to(joined.dtype)
            joined += part * (logs - both).exp()[..., None].to(joined.dtype)
            total = both
        assert joined is not None and total is not None
        # As tokens lie: the kernel takes it as it is, and so does the projection behind.
        out = torch.empty_like(q, memory_format=torch.contiguous_format)
        out.copy_(joined[0].transpose(0, 1))
        ctx.save_for_backward(q, k, v, out, total)
        ctx.scale, ctx.blocks = scale, blocks
        return out

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, dout: Tensor) -> tuple[Tensor | None, ...]:
        q, k, v, out, total = ctx.saved_tensors
        dk, dv = (torch.empty_like(t, memory_format=torch.contiguous_format) for t in (k, v))
        dq = torch.zeros_like(q, dtype=WIDE[q.dtype], memory_format=torch.contiguous_format)
        dout = dout.contiguous()
        for block in ctx.blocks:
            here = slice(block.start, block.end)
            parts = aten._scaled_dot_product_flash_attention_for_cpu_backward(
                *map(_by_head, (dout, q, k[here], v[here], out)),
                *(total, 0.0, block.is_causal),
                scale=ctx.scale,
            )
            of_q, dk_block, dv_block = (t[0].transpose(0, 1) for t in parts)
            dq += of_q
            dk[here].copy_(dk_block)
            dv[here].copy_(dv_block)
        return dq.to(q.dtype), dk, dv, None, None
