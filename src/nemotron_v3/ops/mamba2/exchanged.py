"""A mixer's core where documents go on in other places: its parts, the states exchanged between."""

import torch
from torch import Tensor

from nemotron_v3.layout import SequenceLayout
from nemotron_v3.ops.causal_conv1d.op import causal_conv1d
from nemotron_v3.ops.common.exchange import StateExchange
from nemotron_v3.ops.common.precision import WIDE
from nemotron_v3.ops.gated_rms_norm.op import gated_rms_norm
from nemotron_v3.ops.mamba2.arguments import Options, Tensors
from nemotron_v3.ops.ssd.op import ssd


def mamba2(
    tensors: Tensors,
    options: Options,
    layout: SequenceLayout,
    conv_states: Tensor | None,
    exchange: StateExchange,
    impl: str = "portable",
) -> Tensor:
    zxbcdt, conv_weight, conv_bias, dt_bias, A_log, D, norm_weight = tensors
    n_groups, head_dim, state_size, chunk_size, dt_limit, eps = options
    inner, group_width = A_log.shape[0] * head_dim, n_groups * state_size
    z, xBC, dt = zxbcdt.split([inner, inner + 2 * group_width, A_log.shape[0]], dim=-1)
    xBC, _ = causal_conv1d(
        xBC,
        conv_weight,
        conv_bias,
        layout=layout,
        initial_states=conv_states,
        return_final_states=False,
        activation="silu",
        impl=impl,
    )
    x, B, C = xBC.split([inner, group_width, group_width], dim=-1)
    y, _ = ssd(
        x.unflatten(-1, (-1, head_dim)),
        dt,
        -torch.exp(A_log.to(WIDE[A_log.dtype])),
        B.unflatten(-1, (n_groups, state_size)),
        C.unflatten(-1, (n_groups, state_size)),
        D=D,
        dt_bias=dt_bias,
        dt_limit=dt_limit,
        layout=layout,
        chunk_size=chunk_size,
        return_final_states=False,
        exchange=exchange,
        impl=impl,
    )
    return gated_rms_norm(y.flatten(-2), z, norm_weight, inner // n_groups, eps, impl=impl)
