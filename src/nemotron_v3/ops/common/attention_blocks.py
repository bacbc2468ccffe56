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

from collections.abc import Sequence
from typing import Any, NamedTuple, Protocol

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from nemotron_v3.ops.common.precision import wide

PLANNED = 8192  # tokens of the smallest block that cuDNN makes a plan for
HOPPER_AND_LATER = (9, 10, 12)  # major compute capabilities on which cuDNN's kernel leads
aten = torch.ops.aten


class Block(NamedTuple):
    """Keys `start` to `end`; all are seen, or the causal half of the queries' own."""

    start: int
    end: int
    is_causal: bool


class Attended(NamedTuple):
    """What a kernel makes of a block: `[1, H, n, P]`, the logarithms of the sums (natural, of n
    queries a head, in whatever shape), and what its backward pass takes besides."""

    out: Tensor
    log_sums: Tensor
    rest: tuple[Any, ...]


class Kernel(Protocol):
    """PyTorch's attention of one kind; tensors are `[1, heads, tokens, P]`."""

    def forward(self, q: Tensor, k: Tensor, v: Tensor, is_causal: bool, scale: float) -> Attended:
        """The block attended to."""
        ...

    def backward(
        self, dout: Tensor, qkv: Sequence[Tensor], of: Attended, is_causal: bool, scale: float
    ) -> tuple[Tensor, Tensor, Tensor]:
        """The block's part of dq, and dk and dv; `of` holds the joined results."""
        ...


class OnCPU:
    """PyTorch's flash attention for CPUs, in any floating dtype."""

    def forward(self, q: Tensor, k: Tensor, v: Tensor, is_causal: bool, scale: float) -> Attended:
        out, log_sums = aten._scaled_dot_product_flash_attention_for_cpu(
            q, k, v, 0.0, is_causal, scale=scale
        )
        return Attended(out, log_sums, ())

    def backward(
        self, dout: Tensor, qkv: Sequence[Tensor], of: Attended, is_causal: bool, scale: float
    ) -> tuple[Tensor, Tensor, Tensor]:
        return aten._scaled_dot_product_flash_attention_for_cpu_backward(
            dout, *qkv, of.out, of.log_sums, 0.0, is_causal, scale=scale
        )


class Flash:
    """PyTorch's flash attention on a GPU, for any number of tokens."""

    def forward(self, q: Tensor, k: Tensor, v: Tensor, is_causal: bool, scale: float) -> Attended:
        out, log_sums, cum_q, cum_k, max_q, max_k, seed, offset, _ = (
            aten._scaled_dot_product_flash_attention(q, k, v, 0.0, is_causal, False, scale=scale)
        )
        return Attended(out, log_sums, (cum_q, cum_k, max_q, max_k, seed, offset))

    def backward(
        self, dout: Tensor, qkv: Sequence[Tensor], of: Attended, is_causal: bool, scale: float
    ) -> tuple[Tensor, Tensor, Tensor]:
        *sizes, seed, offset = of.rest
        return aten._scaled_dot_product_flash_attention_backward(
            *(dout, *qkv, of.out, of.log_sums, *sizes, 0.0, is_causal, seed, offset), scale=scale
        )


class Planned:
    """cuDNN's attention, which makes a plan for each shape."""

    def forward(self, q: Tensor, k: Tensor, v: Tensor, is_causal: bool, scale: float) -> Attended:
        out, log_sums, cum_q, cum_k, max_q, max_k, seed, offset, _ = (
            aten._scaled_dot_product_cudnn_attention(
                q, k, v, None, True, 0.0, is_causal, False, scale=scale
            )
        )
        return Attended(out, log_sums, (cum_q, cum_k, max_q, max_k, seed, offset))

    def backward(
        self, dout: Tensor, qkv: Sequence[Tensor], of: Attended, is_causal: bool, scale: float
    ) -> tuple[Tensor, Tensor, Tensor]:
        *sizes, seed, offset = of.rest
        return aten._scaled_dot_product_cudnn_attention_backward(
            *(dout, *qkv, of.out, of.log_sums, seed, offset, None, *sizes, 0.0, is_causal),
            scale=scale,
        )


def takes(q: Tensor) -> bool:
    """Whether a kernel of PyTorch's attends to blocks for such queries."""
    # Not on a GPU yet: in a model of 32 query and 2 key heads the segments'
    # gradients of q, k and v were wrong by up to 87 % there, while each kernel alone, of 8 and 2
    # heads, held the rule. The cause is not known.
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
    if q.is_cuda:  # heads that lie apart, as in a cache, gave wrong gradients on an H200
        q, k, v = (t.contiguous() for t in (q, k, v))
    return _After.apply(q, k, v, scale, blocks_of(q, k.shape[0]))


def blocks_of(q: Tensor, keys: int) -> tuple[Block, ...]:
    """How so many keys are cut for the last queries of a document.

    What cuDNN attends to comes in powers of two, so that a few plans serve every length.
    """
    n = q.shape[0]
    before, start, found = keys - n, 0, []
    if _plans(q):
        while before - start >= PLANNED:
            size = 1 << ((before - start).bit_length() - 1)
            found.append(Block(start, start + size, is_causal=False))
            start += size
    if start < before:
        found.append(Block(start, before, is_causal=False))
    return (*found, Block(before, keys, is_causal=True))


def _plans(q: Tensor) -> bool:
    if not q.is_cuda or q.shape[0] < PLANNED or q.shape[-1] > 128:
        return False
    if torch.are_deterministic_algorithms_enabled():  # cuDNN adds in another order in each run
        return False
    hopper = torch.cuda.get_device_capability(q.device)[0] in HOPPER_AND_LATER
    return hopper and torch.backends.cuda.cudnn_sdp_enabled()


def _chosen(q: Tensor, block: Block) -> Kernel:
    if q.is_cpu:
        return OnCPU()
    size = block.end - block.start
    fixed = size >= PLANNED and (block.is_causal or size & (size - 1) == 0)
    return Planned() if fixed and _plans(q) else Flash()


def _by_head(t: Tensor) -> Tensor:
    """`[tokens, heads, P]` -> `[1, heads, tokens, P]`, a view."""
    return t.transpose(0, 1)[None]


class _After(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, q: Tensor, k: Tensor, v: Tensor, scale: float, blocks: tuple[Block, ...]
    ) -> Tensor:
        n, H, _ = q.shape
        found = []
        joined = total = None
        for block in blocks:
            here = slice(block.start, block.end)
            heads = _by_head(q), _by_head(k[here]), _by_head(v[here])
            kernel = _chosen(q, block)
            part = kernel.forward(*heads, block.is_causal, scale)
            found.append((part.log_sums.shape, part.rest))
            logs = part.log_sums.reshape(1, H, -1)[..., :n]  # [1, H, n]
            if joined is None or total is None:
                joined, total = part.out.to(wide(q.dtype)), logs
                continue
            both = torch.logaddexp(total, logs)
            joined *= (total - both).exp()[..., None].to(joined.dtype)
            joined += part.out * (logs - both).exp()[..., None].to(joined.dtype)
            total = both
        assert joined is not None and total is not None
        # As tokens lie: the kernels take it as it is, and so does the projection behind.
        out = torch.empty_like(q, memory_format=torch.contiguous_format)
        out.copy_(joined[0].transpose(0, 1))
        ctx.save_for_backward(q, k, v, out, total)
        ctx.scale, ctx.blocks, ctx.found = scale, blocks, found
        return out

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, dout: Tensor) -> tuple[Tensor | None, ...]:
        q, k, v, out, total = ctx.saved_tensors
        dk, dv = (torch.empty_like(t, memory_format=torch.contiguous_format) for t in (k, v))
        dq = torch.zeros_like(q, dtype=wide(q.dtype), memory_format=torch.contiguous_format)
        dout = dout.contiguous()
        for block, (shape, rest) in zip(ctx.blocks, ctx.found, strict=True):
            here = slice(block.start, block.end)
            of = Attended(_by_head(out), _padded(total, shape), rest)
            qkv = tuple(map(_by_head, (q, k[here], v[here])))
            kernel = _chosen(q, block)
            parts = kernel.backward(_by_head(dout), qkv, of, block.is_causal, ctx.scale)
            of_q, dk_block, dv_block = (t[0].transpose(0, 1) for t in parts)
            dq += of_q
            dk[here].copy_(dk_block)
            dv[here].copy_(dv_block)
        return dq.to(q.dtype), dk, dv, None, None


def _padded(log_sums: Tensor, shape: torch.Size) -> Tensor:
    """`[1, H, n]` in the shape that a kernel gave, which may hold more queries than there are."""
    rows = shape[2]
    if rows != log_sums.shape[-1]:
        log_sums = torch.nn.functional.pad(log_sums, (0, rows - log_sums.shape[-1]))
    return log_sums.reshape(shape).contiguous()
