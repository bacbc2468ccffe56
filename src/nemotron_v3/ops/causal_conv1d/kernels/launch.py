"""What the kernels are launched with: blocks, tables of a layout, outputs.

Letters: T packed tokens, D documents, C channels, W taps. x, dy and dx are `[T, C]` with
neighbouring channels: slices of a wider projection as well as tensors of their own.
"""

import torch
from torch import Tensor

from nemotron_v3.layout import SequenceLayout
from nemotron_v3.ops.causal_conv1d.kernels import taps
from nemotron_v3.ops.common.host import interpreted, power_of_two
from nemotron_v3.ops.common.launch import Launcher
from nemotron_v3.ops.common.sums import sum_partials

_forward = Launcher(taps.forward_kernel)
_backward = Launcher(taps.backward_kernel)
_initial_backward = Launcher(taps.initial_backward_kernel)


def tables(layout: SequenceLayout) -> tuple[Tensor, Tensor]:
    """int32 `[T]` each: the place of a token in its document, and its document."""

    def build(layout: SequenceLayout) -> tuple[Tensor, Tensor]:
        tokens = torch.arange(layout.num_tokens, dtype=torch.int64, device=layout.device)
        starts = layout.cu_seqlens.index_select(0, layout.seq_idx)
        return (tokens - starts).to(torch.int32), layout.seq_idx

    return layout.derived("causal_conv1d positions", build)


def _forward_blocks(element_size: int) -> tuple[int, int, int]:
    """(BLOCK_T, BLOCK_C, warps): 16 bytes a thread and load."""
    if interpreted():
        return 128, 128, 1
    return 32, 256 // element_size, 4


def _backward_blocks(element_size: int) -> tuple[int, int, int, int]:
    """(BLOCK_C, SEGMENT, UNROLL, warps): 4 bytes a thread and load, for the sake of registers."""
    return 128 // element_size, 256, 4, 1


def launch_forward(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    initial: Tensor | None,
    position: Tensor,
    seq_idx: Tensor,
    cu_seqlens: Tensor,
    silu: bool,
) -> tuple[Tensor, Tensor]:
    """y `[T, C]`, final states `[D, C, W]`."""
    T, C = x.shape
    W = weight.shape[1]
    documents = cu_seqlens.shape[0] - 1
    y = torch.empty(T, C, dtype=x.dtype, device=x.device)
    final = torch.empty(documents, C, W, dtype=x.dtype, device=x.device)
    block_t, block_c, warps = _forward_blocks(x.element_size())
    tiles = -(-T // block_t)
    _forward(
        (tiles + documents) * -(-C // block_c),
        (x, weight, bias, initial, y, final, position, seq_idx, cu_seqlens),
        (T, C, tiles),
        (
            *(x.stride(0), W, block_t, block_c, power_of_two(W)),
            *(silu, bias is not None, initial is not None),
        ),
        warps,
    )
    return y, final


def launch_backward(
    dy: Tensor,
    dfinal: Tensor | None,
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    initial: Tensor | None,
    position: Tensor,
    seq_idx: Tensor,
    cu_seqlens: Tensor,
    silu: bool,
    dx: Tensor,
) -> tuple[Tensor, Tensor | None, Tensor | None]:
    """Writes dx; returns dweight, dbias, dinitial."""
    T, C = x.shape
    W = weight.shape[1]
    block_c, segment, unroll, warps = _backward_blocks(x.element_size())
    segments = -(-T // segment)
    partial = torch.empty(segments, W + 1, C, dtype=torch.float32, device=x.device)
    _backward(
        segments * -(-C // block_c),
        (dy, x, weight, bias, initial, dfinal, dx, partial, position, seq_idx, cu_seqlens),
        (T, C),
        (
            *(dy.stride(0), x.stride(0), dx.stride(0), W, segment, unroll, block_c),
            *(silu, bias is not None, initial is not None, dfinal is not None),
        ),
        warps,
    )
    wanted = [((C, W), weight.dtype)] + ([] if bias is None else [((C,), bias.dtype)])
    dweight, dbias = (*sum_partials(partial, *wanted), None)[:2]
    if initial is None:
        return dweight, dbias, None
    dinitial = torch.empty_like(initial)
    documents = cu_seqlens.shape[0] - 1
    _initial_backward(
        documents * -(-C // block_c),
        (dy, x, weight, bias, initial, dfinal, dinitial, cu_seqlens),
        (C,),
        (
            *(dy.stride(0), x.stride(0), W, block_c),
            *(silu, bias is not None, dfinal is not None),
        ),
        1,
    )
    return dweight, dbias, dinitial
