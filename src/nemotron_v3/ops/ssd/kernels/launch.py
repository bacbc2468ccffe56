"""The order of the kernels, and where each reads and writes.

Letters: T packed tokens, n_docs documents, n_chunks chunks, H heads, P head width, G groups, N
state. Tensors are rows of tokens with neighbouring columns, x as `[T, H*P]`, B and C as `[T, G*N]`:
slices of a wider projection as well as tensors of their own.
"""

from typing import NamedTuple

import torch
from torch import Tensor

from nemotron_v3.ops.common.launch import Launcher
from nemotron_v3.ops.common.sums import sum_partials
from nemotron_v3.ops.ssd.kernels import (
    chunk_bwd_dcb,
    chunk_cumsum,
    chunk_scan_bwd,
    chunk_scan_fwd,
    dA_boundary,
    state_passing,
)
from nemotron_v3.ops.ssd.kernels.tables import Blocks, Strides, Tables

SMALL_STATE = 32  # columns
SHORT = 4  # chunks of a usual document: with fewer, the pipeline over chunks does not pay


class Inputs(NamedTuple):
    """`dt` is `[T, H]` before bias and softplus; `A` holds log(-A) where `Steps.log_A`."""

    x: Tensor
    dt: Tensor
    A: Tensor
    B: Tensor
    C: Tensor
    D: Tensor | None
    dt_bias: Tensor | None
    initial_states: Tensor | None


class Steps(NamedTuple):
    """Limits of dt after the softplus, and whether A comes as log(-A)."""

    low: float
    high: float
    log_A: bool


class Kept(NamedTuple):
    """What the backward needs of the forward.

    `prev_states` `[n_chunks, H, P, N]` are the states before the chunks; `dA_cumsum` is
    `[H, T, 2]`.
    """

    prev_states: Tensor
    dA_cumsum: Tensor


class Outputs(NamedTuple):
    """`final_states` is None where nobody asks for them; the last two are `Kept`."""

    y: Tensor
    final_states: Tensor | None
    prev_states: Tensor
    dA_cumsum: Tensor


class Gradients(NamedTuple):
    """Where gradients go. Those of D and dt_bias have a place also where there is none of them."""

    dx: Tensor
    ddt: Tensor
    dA: Tensor
    dB: Tensor
    dC: Tensor
    dD: Tensor
    ddt_bias: Tensor
    dinitial_states: Tensor | None


def prev_states(x: Tensor, H: int, P: int, N: int, tables: Tables) -> Tensor:
    """A place for the states before the chunks, and for their gradients.

    Over few columns the roundings of `<S, dS>` hardly average out, and the gradient of A would miss
    the accuracy rule; there fp32 costs at most half of what x takes.
    """
    dtype = torch.float32 if N <= SMALL_STATE else x.dtype
    return torch.empty(tables.chunks, H, P, N, dtype=dtype, device=x.device)


def dA_cumsum(x: Tensor, H: int) -> Tensor:
    """A place for the running sums of the log-decay."""
    dtype = torch.float64 if x.dtype == torch.float32 else torch.float32
    return torch.empty(H, x.shape[0], 2, dtype=dtype, device=x.device)


def document_states(x: Tensor, H: int, P: int, N: int, tables: Tables) -> Tensor:
    """A place for one state a document."""
    return torch.empty(tables.documents, H, P, N, dtype=torch.float32, device=x.device)


_chunk_cumsum = Launcher(chunk_cumsum.chunk_cumsum_fwd_kernel)
_chunk_cumsum_bwd = Launcher(chunk_cumsum.chunk_cumsum_bwd_kernel)
_state_passing = Launcher(state_passing.state_passing_kernel)
_dA_boundary = Launcher(dA_boundary.dA_boundary_kernel)
_chunk_scan = Launcher(chunk_scan_fwd.chunk_scan_fwd_kernel)
_chunk_bwd_dcb = Launcher(chunk_bwd_dcb.chunk_bwd_dcb_kernel)
_chunk_scan_bwd = Launcher(chunk_scan_bwd.chunk_scan_bwd_kernel)


def _cumsum_programs(tables: Tables, H: int) -> int:
    return tables.chunks * -(-H // chunk_cumsum.BLOCK_H.value)


def forward(inputs: Inputs, steps: Steps, tables: Tables, blocks: Blocks, outputs: Outputs) -> None:
    """Writes the outputs."""
    sweep(inputs, steps, tables, blocks, outputs)
    scan(inputs, tables, blocks, outputs)


def sweep(inputs: Inputs, steps: Steps, tables: Tables, blocks: Blocks, outputs: Outputs) -> None:
    """Writes the states, before the chunks and behind the documents, and the log-decays."""
    x, dt, A, B, _, _, dt_bias, initial_states = inputs
    _, final_states, prev_states, dA_cumsum = outputs
    start, end, document_chunks, cu_seqlens = tables
    T, H = dt.shape
    sizes = blocks.sizes
    _chunk_cumsum(
        _cumsum_programs(tables, H),
        (dt, dt_bias, A, dA_cumsum, start, end),
        (T, H, steps.low, steps.high),
        (dt.stride(0), sizes, steps.log_A),
    )
    strides = Strides(x.stride(0), B.stride(0))
    long = tables.chunks >= SHORT * tables.documents
    passing = blocks.passing if long else blocks.short_passing
    _state_passing(
        tables.documents * H * -(-sizes.N // passing.slice),
        (x, B, dA_cumsum, initial_states, prev_states, final_states, cu_seqlens, document_chunks),
        (T, H),
        (strides, sizes, passing),
        passing.warps,
        also=(
            ((strides, sizes, blocks.passing), blocks.passing.warps),
            ((strides, sizes, blocks.short_passing), blocks.short_passing.warps),
        ),
    )


def scan(inputs: Inputs, tables: Tables, blocks: Blocks, outputs: Outputs) -> None:
    """Writes y, of the states before the chunks."""
    x, dt, _, B, C, D, _, _ = inputs
    y, _, prev_states, dA_cumsum = outputs
    (T, H), sizes = dt.shape, blocks.sizes
    _chunk_scan(
        tables.chunks * 2 * (H // sizes.HEADS),
        (x, B, C, D, dA_cumsum, prev_states, y, tables.chunk_start, tables.chunk_end),
        (T, H),
        (
            Strides(x.stride(0), B.stride(0), C.stride(0), y.stride(0)),
            sizes,
            blocks.scan.stages,
        ),
        blocks.scan.warps,
    )


class Pairs(NamedTuple):
    """What the first half of the backward leaves to the second, beside `dstates`, the gradients of
    the states behind the chunks."""

    dstates: Tensor
    ddA_rows: Tensor
    ddA_columns: Tensor
    ddA_across: Tensor
    CB_diagonal: Tensor
    dM: Tensor


def backward(
    inputs: Inputs,
    steps: Steps,
    tables: Tables,
    blocks: Blocks,
    kept: Kept,
    dy: Tensor,
    dfinal_states: Tensor | None,
    gradients: Gradients,
) -> None:
    """Writes the gradients."""
    half = pairs(inputs, tables, blocks, kept, dy, dfinal_states, gradients.dinitial_states)
    rest(inputs, steps, tables, blocks, kept, dy, dfinal_states, gradients, half)


def pairs(
    inputs: Inputs,
    tables: Tables,
    blocks: Blocks,
    kept: Kept,
    dy: Tensor,
    dfinal_states: Tensor | None,
    dinitial_states: Tensor | None,
) -> Pairs:
    """The gradients of the states, and of the pairs of tokens within a chunk."""
    x, dt, _, B, C, _, _, _ = inputs
    dA_cumsum = kept.dA_cumsum
    start, end, document_chunks, cu_seqlens = tables
    T, H = dt.shape
    G, sizes = H // blocks.sizes.HEADS_OF_GROUP, blocks.sizes
    dstates = torch.empty_like(kept.prev_states)
    rows, columns, across = _sums(dA_cumsum, 3, H, T)
    CB_diagonal = _sums(dA_cumsum, G, T)
    dM = torch.empty(tables.chunks, 3, G, sizes.TILE, sizes.TILE, dtype=x.dtype, device=x.device)
    strides = Strides(x.stride(0), B.stride(0), C.stride(0), 0, dy.stride(0))
    passing_programs = tables.documents * H * -(-sizes.N // blocks.back_passing.slice)
    _chunk_bwd_dcb(
        passing_programs + tables.chunks * 3 * G,
        (
            *(x, B, C, dA_cumsum, dy, dfinal_states, dstates, dinitial_states, dM),
            *(rows, columns, across, CB_diagonal),
            *(start, end, cu_seqlens, document_chunks),
        ),
        (T, H, passing_programs),
        (strides, sizes, blocks.back_passing, blocks.dcb.stages),
        blocks.dcb.warps,
    )
    return Pairs(dstates, rows, columns, across, CB_diagonal, dM)


def rest(
    inputs: Inputs,
    steps: Steps,
    tables: Tables,
    blocks: Blocks,
    kept: Kept,
    dy: Tensor,
    dfinal_states: Tensor | None,
    gradients: Gradients,
    half: Pairs,
) -> None:
    """Writes the gradients, but for that of the initial states."""
    x, dt, A, B, C, D, dt_bias, initial_states = inputs
    dx, ddt, dA, dB, dC, dD, ddt_bias, _ = gradients
    prev_states, dA_cumsum = kept
    dstates, ddA_rows, ddA_columns, ddA_across, CB_diagonal, dM = half
    start, end, document_chunks, _ = tables
    T, H = dt.shape
    G, sizes = H // blocks.sizes.HEADS_OF_GROUP, blocks.sizes
    ddA_from_states, ddA_to_states, x_dot_dy = _sums(dA_cumsum, 3, H, T)
    strides = Strides(x.stride(0), B.stride(0), C.stride(0), 0, dy.stride(0))
    shape = (tables.chunks, H, sizes.BLOCK_P)
    ddA_through = torch.empty(shape, dtype=torch.float32, device=x.device)
    _chunk_scan_bwd(
        tables.chunks * 2 * (H // sizes.HEADS + 2 * G),
        (
            *(x, B, C, D, dA_cumsum, prev_states, dstates, dy, dM, dx, dB, dC),
            *(ddA_from_states, ddA_to_states, x_dot_dy, ddA_through, start, end),
        ),
        (T, H),
        (
            Strides(*strides[:5], dx.stride(0), dB.stride(0), dC.stride(0)),
            sizes,
            blocks.gradients,
        ),
        blocks.gradient_warps,
    )
    if x.dtype != torch.float32 and not (initial_states is None and dfinal_states is None):
        _dA_boundary(
            tables.documents * H,
            (
                *(x, B, C, dy, dA_cumsum, initial_states, prev_states, dfinal_states, dstates),
                *(ddA_through, ddA_from_states, ddA_to_states, start, end, document_chunks),
            ),
            (T, H),
            (strides, sizes),
            8,
        )
    partial = torch.empty(tables.chunks, 3, H, dtype=torch.float32, device=x.device)
    _chunk_cumsum_bwd(
        _cumsum_programs(tables, H),
        (
            *(dt, dt_bias, A, dA_cumsum, ddA_rows, ddA_columns, ddA_across, CB_diagonal),
            *(ddA_from_states, ddA_to_states, x_dot_dy, ddA_through, ddt, partial, start, end),
        ),
        (T, H, steps.low, steps.high),
        (dt.stride(0), ddt.stride(0), sizes, steps.log_A),
    )
    sum_partials(partial, dA, ddt_bias, dD)


def _sums(dA_cumsum: Tensor, *shape: int) -> Tensor:
    return torch.empty(shape, dtype=dA_cumsum.dtype, device=dA_cumsum.device)
