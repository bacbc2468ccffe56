"""The order of the kernels, and where each reads and writes.

Letters: T packed tokens, D documents, C chunks, H heads, P head width, G groups, N state. Tensors
are rows of tokens with neighbouring columns, x as `[T, H*P]`, B and C as `[T, G*N]`: slices of a
wider projection as well as tensors of their own.
"""

from dataclasses import dataclass

import torch
from torch import Tensor

from nemotron_v3.ops.common.launch import Launcher
from nemotron_v3.ops.common.sums import sum_partials
from nemotron_v3.ops.ssd.kernels import edges, pairs, scan, scan_backward, states, steps
from nemotron_v3.ops.ssd.kernels.tables import Blocks, Sweep

BLOCK_H = 4  # heads of a program of the steps: few, for many programs in flight
SMALL_STATE = 32  # columns
SHORT = 4  # chunks of a usual document: with fewer, a sweep's pipeline does not pay


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
    def sweep(self) -> Sweep:
        long = self.chunks >= SHORT * self.documents
        return self.blocks.sweep if long else self.blocks.short_sweep

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


def states_dtype(dtype: torch.dtype, N: int) -> torch.dtype:
    """Of the states between chunks and their gradients.

    Over few columns the roundings of `<S, dS>` hardly average out, and the gradient of A would
    miss the accuracy rule; there fp32 costs at most half of what x takes.
    """
    return torch.float32 if N <= SMALL_STATE else dtype


_steps = Launcher(steps.forward_kernel)
_steps_backward = Launcher(steps.backward_kernel)
_sweeps = Launcher(states.sweep_kernel)
_edges = Launcher(edges.edges_kernel)
_scan = Launcher(scan.forward_kernel)
_pairs = Launcher(pairs.pairs_kernel)
_gradients = Launcher(scan_backward.gradients_kernel)


def forward(
    plan: Plan,
    given: Steps,
    x: Tensor,
    B: Tensor,
    C: Tensor,
    D: Tensor | None,
    initial: Tensor | None,
    y: Tensor,
    wanted: bool,
) -> tuple[Tensor | None, Tensor, Tensor]:
    """Writes y; returns the final states, if `wanted`, those before the chunks, and `steps`."""
    T, H = given.raw.shape
    P, N, b = plan.head_dim, plan.state, plan.blocks
    running = torch.empty(H, T, 2, dtype=sums_dtype(x.dtype), device=x.device)
    _steps(
        plan.chunks * -(-H // BLOCK_H),
        (given.raw, given.bias, given.A, running, plan.start, plan.end),
        (T, H, given.low, given.high),
        (given.raw.stride(0), b.chunk, BLOCK_H, given.bias is not None, given.log),
    )
    kept = states_dtype(x.dtype, N)
    before = torch.empty(plan.chunks, H, P, N, dtype=kept, device=x.device)
    final = None
    if wanted:
        final = torch.empty(plan.documents, H, P, N, dtype=torch.float32, device=x.device)
    widths = (x.stride(0), B.stride(0), P, N, plan.heads_of_group, b.chunk, b.p)
    kinds = {
        kind: ((*widths, kind.slice, kind.stages, b.precision), kind.warps)
        for kind in (b.sweep, b.short_sweep)
    }
    _sweeps(
        plan.documents * H * -(-N // plan.sweep.slice),
        (x, B, running, initial, before, final, plan.cu_seqlens, plan.first),
        (T, H),
        *kinds[plan.sweep],
        also=tuple(kinds.values()),
    )
    _scan(
        plan.chunks * 2 * (H // b.heads),
        (x, B, C, D, running, before, y, plan.start, plan.end),
        (T, H),
        (
            *(x.stride(0), B.stride(0), C.stride(0), y.stride(0)),
            *(P, N, plan.heads_of_group, b.heads, b.tile, b.p, b.n),
            *(b.scan.stages, b.precision),
        ),
        b.scan.warps,
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
    initial: Tensor | None,
    before: Tensor,
    dy: Tensor,
    dfinal: Tensor | None,
    dx: Tensor,
    dB: Tensor,
    dC: Tensor,
    draw: Tensor,
) -> tuple[list[Tensor], Tensor | None]:
    """Writes dx, dB, dC, draw; returns `[dA, dbias, dD]`, each `[H]`, and dinitial or None."""
    T, H = given.raw.shape
    P, N, b = plan.head_dim, plan.state, plan.blocks
    after = torch.empty_like(before)
    dinitial = None
    if initial is not None:
        dinitial = torch.empty(plan.documents, H, P, N, dtype=torch.float32, device=x.device)
    per_token = torch.empty(6, H, T, dtype=running.dtype, device=x.device)
    rows, columns, across, from_state, to_state, skip = per_token.unbind()
    own = torch.empty(plan.groups, T, dtype=running.dtype, device=x.device)
    dM = torch.empty(plan.chunks, 3, plan.groups, b.tile, b.tile, dtype=x.dtype, device=x.device)
    sweeps = plan.documents * H * -(-N // b.back_sweep.slice)
    _pairs(
        sweeps + plan.chunks * 3 * plan.groups,
        (
            *(x, B, C, running, dy, dfinal, after, dinitial, dM, rows, columns, across, own),
            *(plan.start, plan.end, plan.cu_seqlens, plan.first),
        ),
        (T, H, sweeps),
        (
            *(x.stride(0), B.stride(0), C.stride(0), dy.stride(0)),
            *(P, N, plan.heads_of_group, b.tile, b.p, b.n, b.back_sweep.slice),
            *(b.back_sweep.stages, b.pairs.stages, b.precision),
        ),
        b.pairs.warps,
    )
    through = torch.empty(plan.chunks, H, b.p, dtype=torch.float32, device=x.device)
    _gradients(
        plan.chunks * 2 * (H // b.heads + 2 * plan.groups),
        (
            *(x, B, C, D, running, before, after, dy, dM, dx, dB, dC),
            *(from_state, to_state, skip, through, plan.start, plan.end),
        ),
        (T, H),
        (
            *(x.stride(0), B.stride(0), C.stride(0), dy.stride(0)),
            *(dx.stride(0), dB.stride(0), dC.stride(0)),
            *(P, N, plan.heads_of_group, b.heads, b.tile, b.p, b.n),
            *(D is not None, b.dx.stages, b.dB.stages, b.dC.stages, b.precision),
        ),
        b.dx.warps,
    )
    if x.dtype != torch.float32 and not (initial is None and dfinal is None):
        _edges(
            plan.documents * H,
            (
                *(x, B, C, dy, running, initial, before, dfinal, after),
                *(through, from_state, to_state, plan.start, plan.end, plan.first),
            ),
            (T, H),
            (
                *(x.stride(0), B.stride(0), C.stride(0), dy.stride(0)),
                *(P, N, plan.heads_of_group, b.tile, b.p, b.n),
            ),
            8,
        )
    sums = torch.empty(plan.chunks, 3, H, dtype=torch.float32, device=x.device)
    _steps_backward(
        plan.chunks * -(-H // BLOCK_H),
        (
            *(given.raw, given.bias, given.A, running, rows, columns, across, own),
            *(from_state, to_state, skip, through, draw, sums, plan.start, plan.end),
        ),
        (T, H, given.low, given.high),
        (
            *(plan.heads_of_group, given.raw.stride(0), draw.stride(0), b.tile, b.p, BLOCK_H),
            *(given.bias is not None, given.log),
        ),
    )
    kinds = (given.A, given.A if given.bias is None else given.bias, given.A if D is None else D)
    return sum_partials(sums, *(((H,), t.dtype) for t in kinds)), dinitial
