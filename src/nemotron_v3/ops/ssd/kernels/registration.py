"""The scan as an op of `torch.library`, with its autograd formula.

Letters: T packed tokens, D documents, C chunks, H heads, P head width, G groups, N state.
"""

import torch
from torch import Tensor

from nemotron_v3.layout import SequenceLayout
from nemotron_v3.ops.common.host import register, unit_stride
from nemotron_v3.ops.ssd.kernels import launch
from nemotron_v3.ops.ssd.kernels.tables import Blocks, chunk_tables


def _flat(x: Tensor) -> Tensor:
    """`[T, H, P]` -> `[T, H*P]`, a view where heads are neighbours."""
    return unit_stride(x.flatten(1))


def _plan(x: Tensor, B: Tensor, tables: list[Tensor]) -> launch.Plan:
    _, H, P = x.shape
    G, N = B.shape[1:]
    return launch.Plan(H, P, G, N, Blocks.of(x.dtype, P, N, H // G), *tables)


def _steps(dt, dt_bias, A, low, high) -> launch.Steps:
    bias = None if dt_bias is None else dt_bias.contiguous()
    return launch.Steps(unit_stride(dt), bias, A.contiguous(), False, low, high)


def _forward(x, dt, A, B, C, D, dt_bias, low, high, initial, final, start, end, first, cu_seqlens):
    y = torch.empty(x.shape, dtype=x.dtype, device=x.device)
    plan = _plan(x, B, [start, end, first, cu_seqlens])
    final_states, states, running = launch.forward(
        plan,
        _steps(dt, dt_bias, A, low, high),
        _flat(x),
        _flat(B),
        _flat(C),
        None if D is None else D.contiguous(),
        None if initial is None else initial.contiguous(),
        y.flatten(1),
        final,
    )
    absent = y.new_empty(0, dtype=torch.float32)
    return y, absent if final_states is None else final_states, states, running


def _forward_fake(
    x, dt, A, B, C, D, dt_bias, low, high, initial, final, start, end, first, cu_seqlens
):
    T, H, P = x.shape
    N = B.shape[2]
    return (
        torch.empty(x.shape, dtype=x.dtype, device=x.device),
        torch.empty(
            (cu_seqlens.shape[0] - 1, H, P, N) if final else (0,),
            dtype=torch.float32,
            device=x.device,
        ),
        torch.empty(
            (start.shape[0], H, P, N), dtype=launch.states_dtype(x.dtype, N), device=x.device
        ),
        torch.empty((H, T, 2), dtype=launch.sums_dtype(x.dtype), device=x.device),
    )


def _backward(
    dy,
    dfinal,
    x,
    dt,
    A,
    B,
    C,
    D,
    dt_bias,
    low,
    high,
    running,
    initial,
    states,
    start,
    end,
    first,
    cu_seqlens,
):
    plan = _plan(x, B, [start, end, first, cu_seqlens])
    dx, ddt, dB, dC = (torch.empty(t.shape, dtype=t.dtype, device=t.device) for t in (x, dt, B, C))
    sums, dinitial = launch.backward(
        plan,
        _steps(dt, dt_bias, A, low, high),
        _flat(x),
        _flat(B),
        _flat(C),
        None if D is None else D.contiguous(),
        running,
        None if initial is None else initial.contiguous(),
        states,
        _flat(dy),
        None if dfinal is None else dfinal.contiguous(),
        dx.flatten(1),
        dB.flatten(1),
        dC.flatten(1),
        ddt,
    )
    dA, dbias, dD = sums
    return dx, ddt, dA, dB, dC, dD, dbias, x.new_empty(0) if dinitial is None else dinitial


def _backward_fake(
    dy,
    dfinal,
    x,
    dt,
    A,
    B,
    C,
    D,
    dt_bias,
    low,
    high,
    running,
    initial,
    states,
    start,
    end,
    first,
    cu_seqlens,
):
    def like(t):
        return torch.empty(t.shape, dtype=t.dtype, device=t.device)

    H, P, N = states.shape[1:]
    started = initial is not None
    shape = (cu_seqlens.shape[0] - 1, H, P, N) if started else (0,)
    dinitial = torch.empty(shape, dtype=torch.float32 if started else x.dtype, device=x.device)
    dD, dbias = like(A if D is None else D), like(A if dt_bias is None else dt_bias)
    return like(x), like(dt), like(A), like(B), like(C), dD, dbias, dinitial


def _setup_context(ctx, inputs, output) -> None:
    x, dt, A, B, C, D, dt_bias, ctx.low, ctx.high, initial, final, *tables = inputs
    _, final_states, states, running = output
    ctx.save_for_backward(x, dt, A, B, C, D, dt_bias, running, initial, states, *tables)
    absent = () if final else (final_states,)
    ctx.mark_non_differentiable(states, running, *absent)
    ctx.set_materialize_grads(False)


def _autograd(ctx, dy, dfinal, *_):
    x, dt, A, B, C, D, dt_bias, running, initial, *rest = ctx.saved_tensors
    if dy is None:
        dy = torch.zeros_like(x)
    dx, ddt, dA, dB, dC, dD, dbias, dinitial = _backward_op(
        dy,
        dfinal,
        *(x, dt, A, B, C, D, dt_bias, ctx.low, ctx.high),
        running,
        initial,
        *rest,
    )
    dD = None if D is None else dD
    dbias = None if dt_bias is None else dbias
    dinitial = None if initial is None else dinitial.to(initial.dtype)
    return dx, ddt, dA, dB, dC, dD, dbias, None, None, dinitial, None, None, None, None, None


_INPUTS = (
    "Tensor x, Tensor dt, Tensor A, Tensor B, Tensor C, Tensor? D, Tensor? dt_bias, "
    "float low, float high"
)
_TABLES = "Tensor start, Tensor end, Tensor first, Tensor cu_seqlens"
_backward_op = register(
    f"ssd_backward(Tensor dy, Tensor? dfinal, {_INPUTS}, Tensor running, Tensor? initial, "
    f"Tensor states, {_TABLES}) -> "
    "(Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor)",
    _backward,
    _backward_fake,
)
_forward_op = register(
    f"ssd({_INPUTS}, Tensor? initial, bool final, {_TABLES}) -> (Tensor, Tensor, Tensor, Tensor)",
    _forward,
    _forward_fake,
    setup_context=_setup_context,
    backward=_autograd,
)


def ssd(
    x: Tensor,
    dt: Tensor,
    A: Tensor,
    B: Tensor,
    C: Tensor,
    *,
    D: Tensor | None = None,
    dt_bias: Tensor | None = None,
    dt_limit: tuple[float, float] = (0.0, float("inf")),
    layout: SequenceLayout,
    chunk_size: int = 128,
    initial_states: Tensor | None = None,
    return_final_states: bool = True,
) -> tuple[Tensor, Tensor | None]:
    blocks = Blocks.of(x.dtype, x.shape[2], B.shape[2], x.shape[1] // B.shape[1])
    tables = chunk_tables(layout, blocks.chunk)
    y, final, *_ = _forward_op(
        x,
        dt,
        A,
        B,
        C,
        D,
        dt_bias,
        *map(float, dt_limit),
        initial_states,
        return_final_states,
        *tables,
        layout.cu_seqlens,
    )
    return y, final if return_final_states else None
