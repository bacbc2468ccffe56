"""What the kernels are launched with: blocks, tables of a layout, outputs.

Letters: T packed tokens, n_docs documents, C channels, W taps. x, dy and dx are `[T, C]` with
neighbouring channels: slices of a wider projection as well as tensors of their own.
"""

from typing import NamedTuple

import torch
from torch import Tensor

from nemotron_v3.layout import SequenceLayout
from nemotron_v3.ops.causal_conv1d.kernels import taps
from nemotron_v3.ops.common.host import interpreted, power_of_two
from nemotron_v3.ops.common.launch import Launcher
from nemotron_v3.ops.common.sums import sum_partials

_forward = Launcher(taps.causal_conv1d_fwd_kernel)
_backward = Launcher(taps.causal_conv1d_bwd_kernel)
_initial_states_backward = Launcher(taps.initial_states_bwd_kernel)


class Inputs(NamedTuple):
    x: Tensor
    weight: Tensor
    bias: Tensor | None
    initial_states: Tensor | None


class Outputs(NamedTuple):
    """y `[T, C]`, final states `[n_docs, C, W]`."""

    y: Tensor
    final_states: Tensor


class Gradients(NamedTuple):
    """Where gradients go; None where there is none."""

    dx: Tensor
    dweight: Tensor
    dbias: Tensor | None
    dinitial_states: Tensor | None


class Tables(NamedTuple):
    """A token's place in its document and its document, int32 `[T]`; and `cu_seqlens`."""

    position: Tensor
    seq_idx: Tensor
    cu_seqlens: Tensor

    @property
    def documents(self) -> int:
        return self.cu_seqlens.shape[0] - 1


class Strides(NamedTuple):
    """From token to token."""

    x: int
    dy: int = 0
    dx: int = 0


class ForwardSizes(NamedTuple):
    """What the forward kernel is compiled for; BLOCK_W is a power of two that holds W."""

    W: int
    BLOCK_T: int
    BLOCK_C: int
    BLOCK_W: int
    SILU: bool


class BackwardSizes(NamedTuple):
    """What the backward kernels are compiled for: SEGMENT tokens a program, UNROLL at a time."""

    W: int
    SEGMENT: int
    UNROLL: int
    BLOCK_C: int
    SILU: bool


def tables(layout: SequenceLayout) -> Tables:
    """The tables of a layout, made once."""

    def build(layout: SequenceLayout) -> Tables:
        tokens = torch.arange(layout.num_tokens, dtype=torch.int64, device=layout.device)
        starts = layout.cu_seqlens.index_select(0, layout.seq_idx)
        return Tables((tokens - starts).to(torch.int32), layout.seq_idx, layout.cu_seqlens)

    return layout.derived("causal_conv1d tables", build)


def forward(inputs: Inputs, tables: Tables, silu: bool, outputs: Outputs) -> None:
    """Writes the outputs."""
    x, weight, bias, initial_states = inputs
    (T, C), W = x.shape, weight.shape[1]
    # 16 bytes a thread and load.
    block_t, block_c, warps = 32, 256 // x.element_size(), 4
    if interpreted():
        block_t, block_c, warps = 128, 128, 1
    tiles = -(-T // block_t)
    _forward(
        (tiles + tables.documents) * -(-C // block_c),
        (x, weight, bias, initial_states, *outputs, *tables),
        (T, C, tiles),
        (Strides(x.stride(0)), ForwardSizes(W, block_t, block_c, power_of_two(W), silu)),
        warps,
    )


def backward(
    dy: Tensor,
    dfinal_states: Tensor | None,
    inputs: Inputs,
    tables: Tables,
    silu: bool,
    gradients: Gradients,
) -> None:
    """Writes the gradients."""
    x, weight, bias, initial_states = inputs
    dx, dweight, dbias, dinitial_states = gradients
    (T, C), W = x.shape, weight.shape[1]
    # 4 bytes a thread and load, for the sake of registers.
    sizes = BackwardSizes(W, SEGMENT=256, UNROLL=4, BLOCK_C=128 // x.element_size(), SILU=silu)
    segments, blocks = -(-T // sizes.SEGMENT), -(-C // sizes.BLOCK_C)
    partial = torch.empty(segments, W + 1, C, dtype=torch.float32, device=x.device)
    _backward(
        segments * blocks,
        (dy, x, weight, bias, initial_states, dfinal_states, dx, partial, *tables),
        (T, C),
        (Strides(x.stride(0), dy.stride(0), dx.stride(0)), sizes),
        1,
    )
    sum_partials(partial, dweight, *([] if dbias is None else [dbias]))
    if initial_states is not None:
        _initial_states_backward(
            tables.documents * blocks,
            (dy, *inputs, dfinal_states, dinitial_states, tables.cu_seqlens),
            (C,),
            (Strides(x.stride(0), dy.stride(0)), sizes),
            1,
        )
