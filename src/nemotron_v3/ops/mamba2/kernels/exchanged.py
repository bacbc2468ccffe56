"""The mixer's core in Triton where documents go on elsewhere.

States are exchanged between the sweep over the chunks and the scan of the tokens, their gradients
between the halves of the backward: no token is passed a second time.

Letters: T packed tokens, n_docs pieces of documents, H heads, P head width, N state.
"""

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from nemotron_v3.layout import SequenceLayout
from nemotron_v3.ops.causal_conv1d.kernels import launch as conv
from nemotron_v3.ops.common.exchange import StateExchange
from nemotron_v3.ops.common.host import empty_like, unit_stride
from nemotron_v3.ops.gated_rms_norm import kernels as norm
from nemotron_v3.ops.mamba2.arguments import Options, Tensors
from nemotron_v3.ops.mamba2.kernels import registration as kernels
from nemotron_v3.ops.ssd.kernels import launch as scan
from nemotron_v3.ops.ssd.kernels.parts import Decays
from nemotron_v3.ops.ssd.kernels.tables import Blocks, chunk_tables

TENSORS = 8  # of `_Core`: the projection, six parameters and the conv states


def _arguments(
    tensors: Sequence[Any], ssm_states: Tensor | None, rest: Sequence[Any]
) -> kernels.Arguments:
    given: list[Any] = [*tensors, ssm_states, *rest]
    return kernels.Arguments(*given)


def _columns(a: kernels.Arguments) -> kernels.Columns:
    rows = unit_stride(a.zxbcdt)
    assert rows is not None
    return a.columns(rows)


class _Core(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, *args: Any) -> Tensor:
        tensors, exchange, rest = args[:TENSORS], args[TENSORS], args[TENSORS + 1 :]
        a = _arguments(tensors, None, rest)
        o, given = kernels._outputs(a), _columns(a)
        conv.forward(
            *(a.conv_inputs(given.xBC), a.conv_tables, True),
            conv.Outputs(o.xBC, o.conv_states),
        )
        inputs = a.scan_inputs(o.xBC, given.dt)
        places = scan.Outputs(o.y, o.ssm_states, o.prev_states, o.dA_cumsum)
        scan.sweep(inputs, a.steps, a.tables, a.blocks, places)
        decays = Decays(o.dA_cumsum, a.tables)
        initial = exchange.before(o.ssm_states, decays.whole)
        decays.add_before(o.prev_states, initial)
        scan.scan(inputs, a.tables, a.blocks, places)
        weight = a.norm_weight.contiguous()
        norm.launch_forward(o.y, given.z, weight, o.out, a.inner // a.groups, a.eps)
        ctx.save_for_backward(*tensors, initial, o.xBC, o.y, o.prev_states, o.dA_cumsum)
        ctx.exchange, ctx.rest = exchange, rest
        return o.out

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, dout: Tensor) -> tuple[Tensor | None, ...]:
        *tensors, initial, xBC, y, prev_states, dA_cumsum = ctx.saved_tensors
        a = _arguments(tensors, initial, ctx.rest)
        of_norm = kernels._norm_backward(
            dout, a.zxbcdt, y, a.norm_weight, a.sizes[0], a.groups, a.eps
        )
        g = kernels._scan_gradients(a)
        given, wanted = _columns(a), a.columns(of_norm.dzxbcdt)
        dxBC = torch.empty_like(xBC)
        dx, dB, dC = a.by_stream(dxBC)
        inputs = a.scan_inputs(xBC, given.dt)
        kept = scan.Kept(prev_states, dA_cumsum)
        half = scan.pairs(
            *(inputs, a.tables, a.blocks, kept, wanted.x, None),
            dinitial_states=g.dssm_states,
        )
        behind = ctx.exchange.behind(g.dssm_states).contiguous()
        Decays(dA_cumsum, a.tables).add_behind(half.dstates, behind)
        scan.rest(
            *(inputs, a.steps, a.tables, a.blocks, kept, wanted.x, behind),
            scan.Gradients(dx, wanted.dt, g.dA_log, dB, dC, g.dD, g.ddt_bias, None),
            half,
        )
        bias, states = a.conv_bias, a.conv_states
        dstates = None if states is None else empty_like(states)
        conv.backward(
            *(dxBC, None, a.conv_inputs(given.xBC), a.conv_tables, True),
            conv.Gradients(
                wanted.xBC, g.dconv_weight, None if bias is None else g.dconv_bias, dstates
            ),
        )
        of_parameters = (g.dconv_weight, None if bias is None else g.dconv_bias, g.ddt_bias)
        found = (of_norm.dzxbcdt, *of_parameters, g.dA_log, g.dD, of_norm.dweight, dstates)
        return (*found, *[None] * (1 + len(ctx.rest)))


def mamba2(
    tensors: Tensors,
    options: Options,
    layout: SequenceLayout,
    conv_states: Tensor | None,
    exchange: StateExchange,
) -> Tensor:
    n_groups, head_dim, state_size, _, dt_limit, eps = options
    if conv_states is not None:
        conv_states = conv_states.to(tensors.zxbcdt.dtype)
    heads = tensors.A_log.shape[0]
    blocks = Blocks.of(tensors.zxbcdt.dtype, head_dim, state_size, heads // n_groups)
    tables = conv.tables(layout)
    final = True  # which the exchange is given
    return _Core.apply(
        *(*tensors, conv_states, exchange),
        *(n_groups, head_dim, state_size, *map(float, dt_limit), eps, final),
        *(tables.position, tables.seq_idx, *chunk_tables(layout, blocks.sizes.Q)),
    )
