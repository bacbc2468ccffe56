"""The mixer's core in Triton: the kernels of its parts on the packed projection, in place.

Letters: T packed tokens, D documents, H heads, P head width, G groups, N state, W conv taps,
C = H*P + 2*G*N convolved channels, J the projection's width. No part of the projection is copied:
kernels read z, x, B, C and dt as columns of `zxbcdt`, and the backward writes the columns of one
`dzxbcdt`, whose x columns hold dy in between (docs/design/mamba2.md).
"""

from typing import NamedTuple

import torch
from torch import Tensor

from nemotron_v3.layout import SequenceLayout
from nemotron_v3.ops._triton import register, unit_stride
from nemotron_v3.ops.causal_conv1d.kernels import launch as conv
from nemotron_v3.ops.gated_rms_norm import kernels as norm
from nemotron_v3.ops.ssd.kernels import launch as scan
from nemotron_v3.ops.ssd.kernels.tables import Blocks, chunk_tables


class _Columns(NamedTuple):
    """A projection, or its gradient, and views of it."""

    zxbcdt: Tensor
    inner: int
    heads: int

    @property
    def z(self) -> Tensor:
        return self.zxbcdt.narrow(1, 0, self.inner)

    @property
    def x(self) -> Tensor:
        return self.zxbcdt.narrow(1, self.inner, self.inner)

    @property
    def xBC(self) -> Tensor:
        return self.zxbcdt.narrow(1, self.inner, self.zxbcdt.shape[1] - self.inner - self.heads)

    @property
    def dt(self) -> Tensor:
        return self.zxbcdt.narrow(1, self.zxbcdt.shape[1] - self.heads, self.heads)


class _Tables(NamedTuple):
    """Device tensors made once of a layout."""

    position: Tensor
    seq_idx: Tensor
    start: Tensor
    end: Tensor
    first: Tensor
    cu_seqlens: Tensor

    @property
    def conv(self) -> tuple[Tensor, Tensor, Tensor]:
        return self.position, self.seq_idx, self.cu_seqlens

    @property
    def scan(self) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        return self.start, self.end, self.first, self.cu_seqlens


def _plan(dtype: torch.dtype, H: int, P: int, G: int, N: int, tables: _Tables) -> scan.Plan:
    return scan.Plan(H, P, G, N, Blocks.of(dtype, P, N, H // G), *tables.scan)


def _contiguous(x: Tensor | None) -> Tensor | None:
    return None if x is None else x.contiguous()


# --- forward --------------------------------------------------------------------------------------


def _forward(
    zxbcdt,
    conv_weight,
    conv_bias,
    dt_bias,
    A_log,
    D,
    norm_weight,
    G,
    P,
    N,
    low,
    high,
    eps,
    conv_states,
    ssm_states,
    final,
    *tables,
):
    zxbcdt, tables = unit_stride(zxbcdt), _Tables(*tables)
    H = A_log.shape[0]
    inner, group = H * P, G * N
    given = _Columns(zxbcdt, inner, H)
    xBC, conv_final = conv.launch_forward(
        given.xBC,
        conv_weight.contiguous(),
        _contiguous(conv_bias),
        _contiguous(conv_states),
        *tables.conv,
        True,
    )
    x, B, C = xBC.split([inner, group, group], dim=1)
    y = torch.empty(zxbcdt.shape[0], inner, dtype=zxbcdt.dtype, device=zxbcdt.device)
    steps = scan.Steps(given.dt, dt_bias.contiguous(), A_log.contiguous(), True, low, high)
    ssm_final, states, running = scan.forward(
        _plan(zxbcdt.dtype, H, P, G, N, tables),
        steps,
        x,
        B,
        C,
        D.contiguous(),
        _contiguous(ssm_states),
        y,
        final,
    )
    out = torch.empty_like(y)
    norm.launch_forward(y, given.z, norm_weight.contiguous(), out, inner // G, eps)
    if ssm_final is None:
        ssm_final = y.new_empty(0, dtype=torch.float32)
    return out, conv_final, ssm_final, xBC, y, states, running


def _forward_fake(
    zxbcdt,
    conv_weight,
    conv_bias,
    dt_bias,
    A_log,
    D,
    norm_weight,
    G,
    P,
    N,
    low,
    high,
    eps,
    conv_states,
    ssm_states,
    final,
    *tables,
):
    tables = _Tables(*tables)
    T, H, documents = zxbcdt.shape[0], A_log.shape[0], tables.cu_seqlens.shape[0] - 1
    channels, W = conv_weight.shape

    def empty(*shape, dtype=zxbcdt.dtype):
        return torch.empty(shape, dtype=dtype, device=zxbcdt.device)

    return (
        empty(T, H * P),
        empty(documents, channels, W),
        empty(*((documents, H, P, N) if final else (0,)), dtype=torch.float32),
        empty(T, channels),
        empty(T, H * P),
        empty(tables.start.shape[0], H, P, N, dtype=scan.states_dtype(zxbcdt.dtype, N)),
        empty(H, T, 2, dtype=scan.sums_dtype(zxbcdt.dtype)),
    )


# --- backward -------------------------------------------------------------------------------------


def _norm_backward(dout, zxbcdt, y, norm_weight, H, G, eps):
    """dzxbcdt with dz in its z columns and dy in its x columns; dnorm_weight."""
    zxbcdt, inner = unit_stride(zxbcdt), y.shape[1]
    dzxbcdt = torch.empty(zxbcdt.shape, dtype=zxbcdt.dtype, device=zxbcdt.device)
    given, wanted = _Columns(zxbcdt, inner, H), _Columns(dzxbcdt, inner, H)
    dweight = norm.launch_backward(
        unit_stride(dout),
        y,
        given.z,
        norm_weight.contiguous(),
        wanted.x,
        wanted.z,
        inner // G,
        eps,
    )
    return dzxbcdt, dweight


def _norm_backward_fake(dout, zxbcdt, y, norm_weight, H, G, eps):
    dzxbcdt = torch.empty(zxbcdt.shape, dtype=zxbcdt.dtype, device=zxbcdt.device)
    return dzxbcdt, torch.empty(norm_weight.shape, dtype=norm_weight.dtype, device=y.device)


def _scan_backward(
    dzxbcdt,
    dconv_final,
    dssm_final,
    zxbcdt,
    conv_weight,
    conv_bias,
    dt_bias,
    A_log,
    D,
    G,
    P,
    N,
    low,
    high,
    conv_states,
    ssm_states,
    xBC,
    states,
    running,
    *tables,
):
    """Turns dy in dzxbcdt's x columns into the gradients of x, B, C and dt."""
    zxbcdt, tables = unit_stride(zxbcdt), _Tables(*tables)
    H = A_log.shape[0]
    inner, group = H * P, G * N
    given, wanted = _Columns(zxbcdt, inner, H), _Columns(dzxbcdt, inner, H)
    dxBC = torch.empty_like(xBC)
    x, B, C = xBC.split([inner, group, group], dim=1)
    dx, dB, dC = dxBC.split([inner, group, group], dim=1)
    sums, dssm_states = scan.backward(
        _plan(zxbcdt.dtype, H, P, G, N, tables),
        scan.Steps(given.dt, dt_bias.contiguous(), A_log.contiguous(), True, low, high),
        x,
        B,
        C,
        D.contiguous(),
        running,
        _contiguous(ssm_states),
        states,
        wanted.x,
        _contiguous(dssm_final),
        dx,
        dB,
        dC,
        wanted.dt,
    )
    dweight, dbias, dconv_states = conv.launch_backward(
        dxBC,
        _contiguous(dconv_final),
        given.xBC,
        conv_weight.contiguous(),
        _contiguous(conv_bias),
        _contiguous(conv_states),
        *tables.conv,
        True,
        wanted.xBC,
    )
    absent = dxBC.new_empty(0)
    return (
        dweight,
        absent if dbias is None else dbias,
        *sums,
        absent if dconv_states is None else dconv_states,
        absent if dssm_states is None else dssm_states,
    )


def _scan_backward_fake(
    dzxbcdt,
    dconv_final,
    dssm_final,
    zxbcdt,
    conv_weight,
    conv_bias,
    dt_bias,
    A_log,
    D,
    G,
    P,
    N,
    low,
    high,
    conv_states,
    ssm_states,
    xBC,
    states,
    running,
    *tables,
):
    def like(t):
        if t is None:
            return xBC.new_empty(0)
        return torch.empty(t.shape, dtype=t.dtype, device=t.device)

    dssm = xBC.new_empty(0)
    if ssm_states is not None:
        shape = (tables[-1].shape[0] - 1, *states.shape[1:])
        dssm = torch.empty(shape, dtype=torch.float32, device=states.device)
    given = (conv_weight, conv_bias, A_log, dt_bias, D, conv_states)
    return *map(like, given), dssm


# --- registration ---------------------------------------------------------------------------------


def _setup_context(ctx, inputs, output) -> None:
    *parameters, G, P, N, low, high, eps, conv_states, ssm_states, final = inputs[:-6]
    _, conv_final, ssm_final, xBC, y, states, running = output
    ctx.sizes, ctx.limits, ctx.eps = (G, P, N), (low, high), eps
    ctx.save_for_backward(
        y, *parameters, conv_states, ssm_states, xBC, states, running, *inputs[-6:]
    )
    absent = () if final else (conv_final, ssm_final)
    ctx.mark_non_differentiable(xBC, y, states, running, *absent)
    ctx.set_materialize_grads(False)


def _autograd(ctx, dout, dconv_final, dssm_final, *_):
    (
        y,
        zxbcdt,
        conv_weight,
        conv_bias,
        dt_bias,
        A_log,
        D,
        norm_weight,
        conv_states,
        ssm_states,
        *rest,
    ) = ctx.saved_tensors
    if not torch.compiler.is_compiling():
        # y is needed by the norm alone: it goes before the scan's buffers come.
        ctx.maybe_clear_saved_tensors()
    if dout is None:
        dout = torch.zeros_like(y)
    G, P, N = ctx.sizes
    dzxbcdt, dnorm = _norm_backward_op(dout, zxbcdt, y, norm_weight, A_log.shape[0], G, ctx.eps)
    del y
    dweight, dbias, dA_log, ddt_bias, dD, dconv_states, dssm_states = _scan_backward_op(
        dzxbcdt,
        dconv_final,
        dssm_final,
        zxbcdt,
        conv_weight,
        conv_bias,
        dt_bias,
        A_log,
        D,
        G,
        P,
        N,
        *ctx.limits,
        conv_states,
        ssm_states,
        *rest,
    )
    return (
        dzxbcdt,
        dweight,
        None if conv_bias is None else dbias,
        ddt_bias,
        dA_log,
        dD,
        dnorm,
        *(None,) * 6,
        None if conv_states is None else dconv_states,
        None if ssm_states is None else dssm_states.to(ssm_states.dtype),
        *(None,) * 7,
    )


_PARAMETERS = "Tensor conv_weight, Tensor? conv_bias, Tensor dt_bias, Tensor A_log, Tensor D"
_SIZES = "SymInt groups, SymInt head_dim, SymInt state, float low, float high"
_TABLES = ", ".join(f"Tensor {name}" for name in _Tables._fields)
_norm_backward_op = register(
    "mamba2_norm_backward(Tensor dout, Tensor zxbcdt, Tensor y, Tensor norm_weight, SymInt heads, "
    "SymInt groups, float eps) -> (Tensor, Tensor)",
    _norm_backward,
    _norm_backward_fake,
)
_scan_backward_op = register(
    "mamba2_scan_backward(Tensor(a!) dzxbcdt, Tensor? dconv_final, Tensor? dssm_final, "
    f"Tensor zxbcdt, {_PARAMETERS}, {_SIZES}, Tensor? conv_states, Tensor? ssm_states, Tensor xBC, "
    f"Tensor states, Tensor running, {_TABLES}) -> "
    "(Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor)",
    _scan_backward,
    _scan_backward_fake,
)
_forward_op = register(
    f"mamba2(Tensor zxbcdt, {_PARAMETERS}, Tensor norm_weight, {_SIZES}, float eps, "
    f"Tensor? conv_states, Tensor? ssm_states, bool final, {_TABLES}) -> "
    "(Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor)",
    _forward,
    _forward_fake,
    setup_context=_setup_context,
    backward=_autograd,
)


def mamba2(
    zxbcdt: Tensor,
    conv_weight: Tensor,
    conv_bias: Tensor | None,
    dt_bias: Tensor,
    A_log: Tensor,
    D: Tensor,
    norm_weight: Tensor,
    *,
    n_groups: int,
    head_dim: int,
    state_size: int,
    chunk_size: int = 128,
    dt_limit: tuple[float, float] = (0.0, float("inf")),
    eps: float = 1e-5,
    layout: SequenceLayout,
    conv_states: Tensor | None = None,
    ssm_states: Tensor | None = None,
    return_final_states: bool = True,
) -> tuple[Tensor, Tensor | None, Tensor | None]:
    if conv_states is not None:
        conv_states = conv_states.to(zxbcdt.dtype)
    blocks = Blocks.of(zxbcdt.dtype, head_dim, state_size, A_log.shape[0] // n_groups)
    out, conv_final, ssm_final, *_ = _forward_op(
        zxbcdt,
        conv_weight,
        conv_bias,
        dt_bias,
        A_log,
        D,
        norm_weight,
        n_groups,
        head_dim,
        state_size,
        *map(float, dt_limit),
        eps,
        conv_states,
        ssm_states,
        return_final_states,
        *conv.tables(layout),
        *chunk_tables(layout, blocks.chunk),
        layout.cu_seqlens,
    )
    return (out, conv_final, ssm_final) if return_final_states else (out, None, None)
