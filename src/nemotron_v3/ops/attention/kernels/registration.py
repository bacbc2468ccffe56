"""Attention as ops of `torch.library`, with their autograd formula.

Letters: T packed tokens, n_docs documents, H query heads, J key/value heads, P head width, L
places.
"""

import torch
from torch import Tensor

from nemotron_v3.layout import SequenceLayout
from nemotron_v3.ops.attention.kernels.launch import (
    Call,
    launch_backward,
    launch_forward,
    readable,
)
from nemotron_v3.ops.attention.kernels.tables import Blocks, Tables, tile_tables
from nemotron_v3.ops.common.host import register, unit_stride


def _call(q, k, v, scale, held, cu_seqlens, *tables) -> Call:
    k, v = (readable(t, held is not None) for t in (k, v))
    if held is not None and k.stride() != v.stride():
        k, v = k.contiguous(), v.contiguous()
    return Call(unit_stride(q), k, v, scale, held, cu_seqlens, Tables(*tables))


def _forward(q, k, v, *rest):
    return launch_forward(_call(q, k, v, *rest))


def _forward_fake(q, k, v, *rest):
    T, H, P = q.shape
    out = torch.empty((T, H, P), dtype=q.dtype, device=q.device)
    return out, torch.empty((H, T), dtype=torch.float32, device=q.device)


def _backward(dout, out, log_sums, q, k, v, *rest):
    return launch_backward(_call(q, k, v, *rest), out, unit_stride(dout), log_sums)


def _backward_fake(dout, out, log_sums, q, k, v, *rest):
    return tuple(torch.empty(t.shape, dtype=t.dtype, device=t.device) for t in (q, k, v))


def _setup_context(ctx, inputs, output) -> None:
    q, k, v, ctx.scale, *rest = inputs
    out, log_sums = output
    ctx.save_for_backward(out, log_sums, q, k, v, *rest)
    ctx.mark_non_differentiable(log_sums)
    ctx.set_materialize_grads(False)


def _autograd(ctx, dout, _):
    out, log_sums, q, k, v, *rest = ctx.saved_tensors
    if dout is None:
        return (None,) * (4 + len(rest))
    gradients = _backward_op(dout, out, log_sums, q, k, v, ctx.scale, *rest)
    return *gradients, *((None,) * (1 + len(rest)))


_INPUTS = (
    "Tensor q, Tensor k, Tensor v, float scale, Tensor? held, Tensor cu_seqlens, "
    "Tensor tile_document, Tensor tile_first, Tensor key_document, Tensor key_first"
)
_backward_op = register(
    f"attention_backward(Tensor dout, Tensor out, Tensor log_sums, {_INPUTS}) -> "
    "(Tensor, Tensor, Tensor)",
    _backward,
    _backward_fake,
)
_forward_op = register(
    f"attention({_INPUTS}) -> (Tensor, Tensor)",
    _forward,
    _forward_fake,
    setup_context=_setup_context,
    backward=_autograd,
)


def attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    *,
    layout: SequenceLayout,
    mask: None = None,
    scale: float | None = None,
    dropout_p: float = 0.0,
) -> Tensor:
    """See `ops.attention`; without mask and dropout."""
    tables = tile_tables(layout, Blocks.of(q.dtype, q.shape[2], q.shape[1] // k.shape[1]))
    return _attend(q, k, v, scale, None, layout, tables)


def cached_attention(
    q: Tensor,
    keys: Tensor,
    values: Tensor,
    *,
    layout: SequenceLayout,
    starts: tuple[int, ...],
    positions: Tensor,
    scale: float | None = None,
) -> Tensor:
    """See `ops.cached_attention`."""
    blocks = Blocks.of(q.dtype, q.shape[2], q.shape[1] // keys.shape[1])
    tables = tile_tables(layout, blocks, starts, positions)
    return _attend(q, keys, values, scale, positions, layout, tables)


def _attend(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    scale: float | None,
    held: Tensor | None,
    layout: SequenceLayout,
    tables: Tables,
) -> Tensor:
    scale = q.shape[2] ** -0.5 if scale is None else float(scale)
    return _forward_op(q, k, v, scale, held, layout.cu_seqlens, *tables)[0]
