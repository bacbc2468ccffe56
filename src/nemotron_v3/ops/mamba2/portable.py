"""Everything of a Mamba-2 mixer between its projections, in plain PyTorch.

Letters: T packed tokens, D documents, H heads, P head width, G groups, N state, W conv taps; the
packed projection is `z [H*P] | x [H*P] | B [G*N] | C [G*N] | dt [H]`.
"""

import torch
from torch import Tensor

from nemotron_v3.layout import SequenceLayout
from nemotron_v3.ops._dispatch import wide
from nemotron_v3.ops.causal_conv1d.op import causal_conv1d
from nemotron_v3.ops.gated_rms_norm.op import gated_rms_norm
from nemotron_v3.ops.ssd.op import ssd


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
) -> tuple[Tensor, Tensor, Tensor]:
    H, P, G, N = A_log.shape[0], head_dim, n_groups, state_size
    z, xBC, dt = zxbcdt.split([H * P, H * P + 2 * G * N, H], dim=-1)
    xBC, conv_states = causal_conv1d(
        xBC,
        conv_weight,
        conv_bias,
        layout=layout,
        initial_states=conv_states,
        return_final_states=True,
        impl="portable",
    )
    x, B, C = xBC.split([H * P, G * N, G * N], dim=-1)
    y, ssm_states = ssd(
        x.unflatten(-1, (H, P)),
        dt,
        -torch.exp(A_log.to(wide(A_log.dtype))),
        B.unflatten(-1, (G, N)),
        C.unflatten(-1, (G, N)),
        D=D,
        dt_bias=dt_bias,
        dt_limit=dt_limit,
        layout=layout,
        chunk_size=chunk_size,
        initial_states=ssm_states,
        impl="portable",
    )
    y = gated_rms_norm(y.flatten(-2), z, norm_weight, H * P // G, eps, impl="portable")
    return y, conv_states, ssm_states
