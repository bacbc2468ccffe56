"""What the kernels of attention are launched with.

Letters: T packed tokens, n_docs documents, H query heads, J key/value heads, P head width, L
places. Tensors have neighbouring elements along P; q and dout are `[T, H, P]`, k and v `[T, J, P]`,
or `[n_docs, J, L, P]` in a cache.
"""

import math
from dataclasses import dataclass

import torch
from torch import Tensor

from nemotron_v3.ops.attention.kernels import backward, forward
from nemotron_v3.ops.attention.kernels.tables import Blocks, Tables
from nemotron_v3.ops.common.launch import Launcher

_forward = Launcher(forward.forward_kernel)
_dq = Launcher(backward.dq_kernel)
_dkv = Launcher(backward.dkv_kernel)

LOG2_E = math.log2(math.e)


@dataclass(frozen=True)
class Call:
    """One call's tensors. `held` is int64 `[n_docs]` where k and v lie in a cache, else None."""

    q: Tensor
    k: Tensor
    v: Tensor
    scale: float
    held: Tensor | None
    cu_seqlens: Tensor
    tables: Tables

    @property
    def cached(self) -> bool:
        return self.held is not None

    @property
    def blocks(self) -> Blocks:
        return Blocks.of(self.q.dtype, self.q.shape[2], self.q.shape[1] // self.key_heads)

    @property
    def key_heads(self) -> int:
        return self.k.shape[1]

    @property
    def places(self) -> int:
        """From one head of a cache to the next, in tokens; they may be more than L."""
        return self.k.stride(1) // self.k.stride(2) if self.cached else 0

    @property
    def strides(self) -> tuple[int, ...]:
        """From token to token and from head to head, of q, k and v: what a kernel is made for."""
        found: list[int] = [self.q.stride(0), self.q.stride(1)]
        for t in (self.k, self.v):
            found += (t.stride(2), 0) if self.cached else (t.stride(0), t.stride(1))
        return tuple(found)


def readable(t: Tensor, cached: bool) -> Tensor:
    """`t`, copied where the kernels could not find their way in it.

    A cache's rows and heads follow each other at equal distances, `places` tokens each.
    """
    if t.stride(-1) != 1:
        return t.contiguous()
    if not cached:
        return t
    _, J, L, P = t.shape
    row, head, token, _ = t.stride()
    regular = token >= P and head % token == 0 and head >= L * token and row == J * head
    return t if regular else t.contiguous()


def launch_forward(call: Call) -> tuple[Tensor, Tensor]:
    """The output `[T, H, P]`, and the logarithms (to base 2) of the softmax' sums `[H, T]`."""
    T, H, P = call.q.shape
    b = call.blocks
    out = torch.empty(T, H, P, dtype=call.q.dtype, device=call.q.device)
    log_sums = torch.empty(H, T, dtype=torch.float32, device=call.q.device)
    _forward(
        call.tables.first.shape[0] * H,
        (
            *(call.q, call.k, call.v, out, log_sums, call.held, call.cu_seqlens),
            *(call.tables.document, call.tables.first),
        ),
        (T, call.places, call.scale * LOG2_E),
        (
            *(*call.strides, H, call.key_heads, P, b.p, b.forward.m, b.forward.n),
            *(b.forward.stages, b.precision, call.cached),
        ),
        b.forward.warps,
    )
    return out, log_sums


def launch_backward(
    call: Call, out: Tensor, dout: Tensor, log_sums: Tensor
) -> tuple[Tensor, Tensor, Tensor]:
    """dq, dk, dv, contiguous, in the dtypes of q, k and v."""
    T, H, P = call.q.shape
    J, b, tables = call.key_heads, call.blocks, call.tables
    dq = torch.empty(T, H, P, dtype=call.q.dtype, device=call.q.device)
    deltas = torch.empty_like(log_sums)
    strides = (*call.strides, dout.stride(0), dout.stride(1))
    scales = (call.scale * LOG2_E, call.scale)
    _dq(
        tables.first.shape[0] * H,
        (
            *(call.q, call.k, call.v, out, dout, log_sums, deltas, dq, call.held),
            *(call.cu_seqlens, tables.document, tables.first),
        ),
        (T, call.places, *scales),
        (
            *(*strides, H, J, P, b.p, b.dq.m, b.dq.n, b.dq.stages, b.precision),
            *(call.cached, call.q.dtype == torch.float32),
        ),
        b.dq.warps,
    )
    parts = H // J // b.heads
    # What a cache holds behind a row's own tokens has no gradient.
    new = torch.zeros if call.cached else torch.empty
    dtype = call.k.dtype if parts == 1 else torch.float32
    dk, dv = (new(parts, *call.k.shape, dtype=dtype, device=call.q.device) for _ in range(2))
    _dkv(
        tables.key_first.shape[0] * J * parts,
        (
            *(call.q, call.k, call.v, dout, log_sums, deltas, dk, dv, call.held),
            *(call.cu_seqlens, tables.key_document, tables.key_first),
        ),
        (T, call.places, call.k.shape[2] if call.cached else 0, call.k.numel(), *scales),
        (
            *(*strides, H, J, P, b.p, b.heads, b.dkv.m, b.dkv.n, b.dkv.stages),
            *(b.precision, call.cached),
        ),
        b.dkv.warps,
    )
    if parts == 1:
        return dq, dk[0], dv[0]
    return dq, dk.sum(0).to(call.k.dtype), dv.sum(0).to(call.v.dtype)
