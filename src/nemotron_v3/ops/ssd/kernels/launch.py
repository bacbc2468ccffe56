"""The order of the kernels, and where each reads and writes.

Letters: T packed tokens, D documents, C chunks, H heads, P head width, G groups, N state. Tensors
are rows of tokens with neighbouring columns, x as `[T, H*P]`, B and C as `[T, G*N]`: slices of a
wider projection as well as tensors of their own.
"""

from dataclasses import dataclass

import torch
import triton
from torch import Tensor

from nemotron_v3.ops.ssd.kernels import scan, scan_backward, states, steps
from nemotron_v3.ops.ssd.kernels.tables import Blocks

BLOCK_H = 16


@dataclass(frozen=True)
class Plan:
    """Sizes of one call. `start`, `end`, `first` are `chunk_tables`."""

    heads: int
    head_dim: int
    groups: int
    state: int
    blocks: Blocks
    start: Tensor
    end: Tensor
    first: Tensor
    cu_seqlens: Tensor

    @property
    def chunks(self) -> int:
        return self.start.shape[0]

    @property
    def documents(self) -> int:
        return self.cu_seqlens.shape[0] - 1

    @property
    def heads_of_group(self) -> int:
        return self.heads // self.groups


@dataclass(frozen=True)
class Steps:
    """`raw` `[T, H]`, `bias` `[H]` or None, A `[H]` (log(-A) where `log`), limits of dt."""

    raw: Tensor
    bias: Tensor | None
    A: Tensor
    log: bool
    low: float
    high: float


def sums_dtype(dtype: torch.dtype) -> torch.dtype:
    """Of `steps`, for activations of `dtype`."""
    return torch.float64 if dtype == torch.float32 else torch.float32


def forward(
    plan: Plan,
    given: Steps,
    x: Tensor,
    B: Tensor,
    C: Tensor,
    D: Tensor | None,
    initial: Tensor | None,
    y: Tensor,
) -> tuple[Tensor, Tensor, Tensor]:
    """Writes y; returns final states, the states before the chunks, and `steps` of steps.py."""
    T, H = given.raw.shape
    P, N, b = plan.head_dim, plan.state, plan.blocks
    running = torch.empty(H, T, 2, dtype=sums_dtype(x.dtype), device=x.device)
    steps.forward_kernel[(plan.chunks * triton.cdiv(H, BLOCK_H),)](
        given.raw,
        given.bias,
        given.A,
        running,
        plan.start,
        plan.end,
        T,
        H,
        given.raw.stride(0),
        given.low,
        given.high,
        b.chunk,
        BLOCK_H,
        given.bias is not None,
        given.log,
        num_warps=4,
    )
    before = torch.empty(plan.chunks, H, P, N, dtype=x.dtype, device=x.device)
    final = torch.empty(plan.documents, H, P, N, dtype=torch.float32, device=x.device)
    _sweep(plan, x, B, running, initial, before, final)
    scan.forward_kernel[(plan.chunks * 2 * (H // b.heads),)](
        x,
        B,
        C,
        D,
        running,
        before,
        y,
        plan.start,
        plan.end,
        T,
        H,
        x.stride(0),
        B.stride(0),
        C.stride(0),
        y.stride(0),
        P,
        N,
        plan.heads_of_group,
        b.heads,
        b.tile,
        b.p,
        b.n,
        D is not None,
        b.scan_stages,
        b.precision,
        num_warps=b.warps,
        maxnreg=b.registers,
    )
    return final, before, running


def backward(
    plan: Plan,
    given: Steps,
    x: Tensor,
    B: Tensor,
    C: Tensor,
    D: Tensor | None,
    running: Tensor,
    before: Tensor,
    dy: Tensor,
    dfinal: Tensor | None,
    dx: Tensor,
    dB: Tensor,
    dC: Tensor,
    draw: Tensor,
) -> tuple[Tensor, Tensor]:
    """Writes dx, dB, dC, draw; returns the sums `[3, H]` of dA, dbias, dD, and dinitial."""
    T, H = given.raw.shape
    P, N, b = plan.head_dim, plan.state, plan.blocks
    after = torch.empty_like(before)
    dinitial = torch.empty(plan.documents, H, P, N, dtype=torch.float32, device=x.device)
    rows = triton.cdiv(N, b.slice) * b.p
    through = torch.empty(plan.chunks, H, rows, dtype=torch.float32, device=x.device)
    _sweep(plan, dy, C, running, dfinal, after, dinitial, before, through)

    per_token = torch.empty(5, H, T, dtype=running.dtype, device=x.device)
    direct, diagonal, across, from_state, to_state = per_token
    dskip = torch.empty(plan.chunks, 2, H, dtype=torch.float32, device=x.device)
    if D is None:
        dskip.zero_()
    grid = (plan.chunks * 2 * plan.groups,)
    scan_backward.dC_kernel[grid](
        x,
        B,
        C,
        running,
        before,
        dy,
        dC,
        from_state,
        plan.start,
        plan.end,
        T,
        H,
        x.stride(0),
        B.stride(0),
        C.stride(0),
        dy.stride(0),
        dC.stride(0),
        P,
        N,
        plan.heads_of_group,
        b.tile,
        b.p,
        b.n,
        b.stages,
        b.precision,
        num_warps=b.warps,
        maxnreg=b.registers,
    )
    scan_backward.dB_kernel[grid](
        x,
        C,
        running,
        after,
        dy,
        dB,
        plan.start,
        plan.end,
        T,
        H,
        x.stride(0),
        C.stride(0),
        dy.stride(0),
        dB.stride(0),
        P,
        N,
        plan.heads_of_group,
        b.tile,
        b.p,
        b.n,
        b.stages,
        b.precision,
        num_warps=b.warps,
        maxnreg=b.registers,
    )
    scan_backward.dx_kernel[(plan.chunks * 2 * (H // b.heads),)](
        x,
        B,
        C,
        D,
        running,
        after,
        dy,
        dx,
        direct,
        diagonal,
        across,
        to_state,
        dskip,
        plan.start,
        plan.end,
        T,
        H,
        x.stride(0),
        B.stride(0),
        C.stride(0),
        dy.stride(0),
        dx.stride(0),
        P,
        N,
        plan.heads_of_group,
        b.heads,
        b.tile,
        b.p,
        b.n,
        D is not None,
        b.stages,
        b.precision,
        num_warps=b.warps,
        maxnreg=b.registers,
    )
    sums = torch.empty(plan.chunks, 3, H, dtype=torch.float32, device=x.device)
    steps.backward_kernel[(plan.chunks * triton.cdiv(H, BLOCK_H),)](
        given.raw,
        given.bias,
        given.A,
        running,
        direct,
        diagonal,
        across,
        from_state,
        to_state,
        through,
        dskip,
        draw,
        sums,
        plan.start,
        plan.end,
        T,
        H,
        given.raw.stride(0),
        draw.stride(0),
        given.low,
        given.high,
        b.tile,
        rows,
        BLOCK_H,
        given.bias is not None,
        given.log,
        num_warps=4,
    )
    return sums.sum(0), dinitial


def _sweep(
    plan: Plan,
    u: Tensor,
    v: Tensor,
    running: Tensor,
    first: Tensor | None,
    states_out: Tensor,
    last: Tensor,
    before: Tensor | None = None,
    through: Tensor | None = None,
) -> None:
    """Backwards where the states `before` the chunks are given."""
    H, T, _ = running.shape
    b = plan.blocks
    slices = triton.cdiv(plan.state, b.slice)
    states.sweep_kernel[(plan.documents * H * slices,)](
        u,
        v,
        running,
        first,
        states_out,
        last,
        before,
        through,
        plan.cu_seqlens,
        plan.first,
        T,
        H,
        u.stride(0),
        v.stride(0),
        plan.head_dim,
        plan.state,
        plan.heads_of_group,
        b.chunk,
        b.p,
        b.slice,
        slices,
        first is not None,
        before is not None,
        b.sweep_stages,
        b.precision,
        num_warps=b.sweep_warps if before is None else 4,
    )
