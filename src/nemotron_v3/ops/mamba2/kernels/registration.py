"""The mixer's core in Triton: the kernels of its parts on the packed projection, in place.

Letters: T packed tokens, H heads, P head width, G groups, N state, W conv taps, conv_dim =
H*P + 2*G*N convolved channels. No part of the projection is copied: kernels read z, x, B, C and dt
as columns of `zxbcdt`, and the backward writes the columns of one `dzxbcdt`, whose x columns hold
dy in between (docs/design/mamba2.md).
"""

from typing import NamedTuple

import torch
from torch import Tensor

from nemotron_v3.layout import SequenceLayout
from nemotron_v3.ops.causal_conv1d.kernels import launch as conv
from nemotron_v3.ops.common.host import (
    absent,
    contiguous,
    empty_like,
    gradients_of,
    register,
    schema,
    unit_stride,
)
from nemotron_v3.ops.gated_rms_norm import kernels as norm
from nemotron_v3.ops.ssd.kernels import launch as scan
from nemotron_v3.ops.ssd.kernels.tables import Blocks, Tables, chunk_tables


class Columns(NamedTuple):
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


class Arguments(NamedTuple):
    """Of the forward op; the last six are the tables of the convolution and of the scan."""

    zxbcdt: Tensor
    conv_weight: Tensor
    conv_bias: Tensor | None
    dt_bias: Tensor
    A_log: Tensor
    D: Tensor
    norm_weight: Tensor
    conv_states: Tensor | None
    ssm_states: Tensor | None
    groups: int
    head_dim: int
    state: int
    low: float
    high: float
    eps: float
    final: bool
    position: Tensor
    seq_idx: Tensor
    chunk_start: Tensor
    chunk_end: Tensor
    document_chunks: Tensor
    cu_seqlens: Tensor

    @property
    def sizes(self) -> tuple[int, int, int]:
        """H, P, N."""
        return self.A_log.shape[0], self.head_dim, self.state

    @property
    def inner(self) -> int:
        return self.A_log.shape[0] * self.head_dim

    def columns(self, zxbcdt: Tensor) -> Columns:
        return Columns(zxbcdt, self.inner, self.A_log.shape[0])

    def by_stream(self, xBC: Tensor) -> tuple[Tensor, ...]:
        """x `[T, H*P]`, B and C `[T, G*N]`, views."""
        group = self.groups * self.state
        return xBC.split([self.inner, group, group], dim=1)

    def conv_inputs(self, xBC: Tensor) -> conv.Inputs:
        weight, bias, states = map(contiguous, (self.conv_weight, self.conv_bias, self.conv_states))
        return conv.Inputs(xBC, weight, bias, states)

    def scan_inputs(self, xBC: Tensor, dt: Tensor) -> scan.Inputs:
        x, B, C = self.by_stream(xBC)
        A_log, D, dt_bias, states = map(
            contiguous, (self.A_log, self.D, self.dt_bias, self.ssm_states)
        )
        return scan.Inputs(x, dt, A_log, B, C, D, dt_bias, states)

    @property
    def steps(self) -> scan.Steps:
        return scan.Steps(self.low, self.high, log_A=True)

    @property
    def conv_tables(self) -> conv.Tables:
        return conv.Tables(self.position, self.seq_idx, self.cu_seqlens)

    @property
    def tables(self) -> Tables:
        return Tables(*self[-4:])

    @property
    def blocks(self) -> Blocks:
        H, P, N = self.sizes
        return Blocks.of(self.zxbcdt.dtype, P, N, H // self.groups)


# --- forward --------------------------------------------------------------------------------------


class Kept(NamedTuple):
    """What the backward needs of the forward: the convolution's and the scan's outputs."""

    xBC: Tensor
    y: Tensor
    prev_states: Tensor
    dA_cumsum: Tensor


class Outputs(NamedTuple):
    """The last four are `Kept`."""

    out: Tensor
    conv_states: Tensor
    ssm_states: Tensor
    xBC: Tensor
    y: Tensor
    prev_states: Tensor
    dA_cumsum: Tensor


def _outputs(a: Arguments) -> Outputs:
    given, tables = a.zxbcdt, a.tables
    T, channels = given.shape[0], a.conv_weight.shape[0]

    def empty(*shape: int) -> Tensor:
        return torch.empty(shape, dtype=given.dtype, device=given.device)

    return Outputs(
        out=empty(T, a.inner),
        conv_states=empty(tables.documents, *a.conv_weight.shape),
        ssm_states=scan.document_states(given, *a.sizes, tables)
        if a.final
        else absent(given, torch.float32),
        xBC=empty(T, channels),
        y=empty(T, a.inner),
        prev_states=scan.prev_states(given, *a.sizes, tables),
        dA_cumsum=scan.dA_cumsum(given, a.sizes[0]),
    )


def _forward(*args) -> Outputs:
    a = Arguments(*args)
    o, given = _outputs(a), a.columns(unit_stride(a.zxbcdt))
    conv.forward(a.conv_inputs(given.xBC), a.conv_tables, True, conv.Outputs(o.xBC, o.conv_states))
    final = o.ssm_states if a.final else None
    scan.forward(
        *(a.scan_inputs(o.xBC, given.dt), a.steps, a.tables, a.blocks),
        scan.Outputs(o.y, final, o.prev_states, o.dA_cumsum),
    )
    norm.launch_forward(
        *(o.y, given.z, a.norm_weight.contiguous(), o.out), a.inner // a.groups, a.eps
    )
    return o


def _forward_fake(*args) -> Outputs:
    return _outputs(Arguments(*args))


# --- backward -------------------------------------------------------------------------------------


class NormArguments(NamedTuple):
    dout: Tensor
    zxbcdt: Tensor
    y: Tensor
    norm_weight: Tensor
    heads: int
    groups: int
    eps: float


class NormGradients(NamedTuple):
    dzxbcdt: Tensor
    dweight: Tensor


def _norm_gradients(a: NormArguments) -> NormGradients:
    return NormGradients(empty_like(a.zxbcdt), empty_like(a.norm_weight))


def _norm_backward(*args) -> NormGradients:
    """dzxbcdt with dz in its z columns and dy in its x columns, and the gradient of the weight."""
    a = NormArguments(*args)
    g, inner = _norm_gradients(a), a.y.shape[1]
    given = Columns(unit_stride(a.zxbcdt), inner, a.heads)
    wanted = Columns(g.dzxbcdt, inner, a.heads)
    norm.launch_backward(
        *(unit_stride(a.dout), a.y, given.z, a.norm_weight.contiguous()),
        norm.Gradients(wanted.x, wanted.z, g.dweight),
        *(inner // a.groups, a.eps),
    )
    return g


def _norm_backward_fake(*args) -> NormGradients:
    return _norm_gradients(NormArguments(*args))


class Upstream(NamedTuple):
    """What the backward of scan and convolution is given before `Arguments`."""

    dzxbcdt: Tensor
    dconv_states: Tensor | None
    dssm_states: Tensor | None
    xBC: Tensor
    prev_states: Tensor
    dA_cumsum: Tensor


class ScanGradients(NamedTuple):
    dconv_weight: Tensor
    dconv_bias: Tensor
    ddt_bias: Tensor
    dA_log: Tensor
    dD: Tensor
    dconv_states: Tensor
    dssm_states: Tensor


def _scan_gradients(a: Arguments) -> ScanGradients:
    weights = (a.conv_weight, a.conv_bias, a.dt_bias, a.A_log, a.D, a.conv_states)
    states = nothing = absent(a.zxbcdt)
    if a.ssm_states is not None:
        states = scan.document_states(a.zxbcdt, *a.sizes, a.tables)
    return ScanGradients(*[nothing if w is None else empty_like(w) for w in weights], states)


def _scan_backward(*args) -> ScanGradients:
    """Turns dy in dzxbcdt's x columns into the gradients of x, B, C and dt."""
    b, a = Upstream(*args[:6]), Arguments(*args[6:])
    g = _scan_gradients(a)
    given, wanted = a.columns(unit_stride(a.zxbcdt)), a.columns(b.dzxbcdt)
    dxBC = torch.empty_like(b.xBC)
    dx, dB, dC = a.by_stream(dxBC)
    dinitial = None if a.ssm_states is None else g.dssm_states
    scan.backward(
        *(a.scan_inputs(b.xBC, given.dt), a.steps, a.tables, a.blocks),
        scan.Kept(b.prev_states, b.dA_cumsum),
        wanted.x,
        contiguous(b.dssm_states),
        scan.Gradients(dx, wanted.dt, g.dA_log, dB, dC, g.dD, g.ddt_bias, dinitial),
    )
    conv.backward(
        *(dxBC, contiguous(b.dconv_states), a.conv_inputs(given.xBC), a.conv_tables, True),
        conv.Gradients(
            wanted.xBC,
            g.dconv_weight,
            None if a.conv_bias is None else g.dconv_bias,
            None if a.conv_states is None else g.dconv_states,
        ),
    )
    return g


def _scan_backward_fake(*args) -> ScanGradients:
    return _scan_gradients(Arguments(*args[6:]))


# --- registration ---------------------------------------------------------------------------------


def _setup_context(ctx, inputs, output) -> None:
    a, o = Arguments(*inputs), Outputs(*output)
    kept = Kept(*o[3:])
    ctx.options = a[9:16]
    ctx.save_for_backward(*kept, *a[:9], *a[16:])
    ctx.mark_non_differentiable(*kept, *(() if a.final else (o.conv_states, o.ssm_states)))
    ctx.set_materialize_grads(False)


def _autograd(ctx, dout, dconv_states, dssm_states, *_) -> Arguments:
    xBC, y, prev_states, dA_cumsum, *saved = ctx.saved_tensors
    a = Arguments(*saved[:9], *ctx.options, *saved[9:])
    if not torch.compiler.is_compiling():
        # y is needed by the norm alone: it goes before the scan's buffers come.
        ctx.maybe_clear_saved_tensors()
    if dout is None:
        dout = torch.zeros_like(y)
    dzxbcdt, dnorm_weight = _norm_backward_op(
        dout, a.zxbcdt, y, a.norm_weight, a.sizes[0], a.groups, a.eps
    )
    del y
    g = ScanGradients(
        *_scan_backward_op(dzxbcdt, dconv_states, dssm_states, xBC, prev_states, dA_cumsum, *a)
    )
    states = a.ssm_states
    return gradients_of(
        Arguments,
        zxbcdt=dzxbcdt,
        conv_weight=g.dconv_weight,
        conv_bias=None if a.conv_bias is None else g.dconv_bias,
        dt_bias=g.ddt_bias,
        A_log=g.dA_log,
        D=g.dD,
        norm_weight=dnorm_weight,
        conv_states=None if a.conv_states is None else g.dconv_states,
        ssm_states=None if states is None else g.dssm_states.to(states.dtype),
    )


_norm_backward_op = register(
    schema("mamba2_norm_backward", NormArguments, results=2), _norm_backward, _norm_backward_fake
)
_of_scan = schema("mamba2_scan_backward", Upstream, Arguments, results=7, mutated="dzxbcdt")
_scan_backward_op = register(_of_scan, _scan_backward, _scan_backward_fake)
_of_forward = schema("mamba2", Arguments, results=7)
_forward_op = register(
    _of_forward, _forward, _forward_fake, setup_context=_setup_context, backward=_autograd
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
    tables = conv.tables(layout)
    out, conv_final, ssm_final, *_ = _forward_op(
        *(zxbcdt, conv_weight, conv_bias, dt_bias, A_log, D, norm_weight, conv_states, ssm_states),
        *(n_groups, head_dim, state_size, *map(float, dt_limit), eps, return_final_states),
        *(tables.position, tables.seq_idx, *chunk_tables(layout, blocks.sizes.Q)),
    )
    return (out, conv_final, ssm_final) if return_final_states else (out, None, None)
