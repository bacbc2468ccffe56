"""The Mamba-2 mixer between its two projections: the references of its parts, one after another.

T packed tokens, H heads, P head width, G groups, N state, W conv width, conv_dim = H P + 2 G N conv
channels, J = H P + conv_dim + H width of the input projection's result, n_docs documents.
"""

import math

import torch
from torch import Tensor

from nemotron_v3.layout import SequenceLayout
from nemotron_v3.ops.causal_conv1d.reference import causal_conv1d
from nemotron_v3.ops.gated_rms_norm.reference import gated_rms_norm
from nemotron_v3.ops.ssd.reference import ssd


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
    dt_limit: tuple[float, float] = (0.0, math.inf),
    eps: float = 1e-5,
    layout: SequenceLayout,
    conv_states: Tensor | None = None,
    ssm_states: Tensor | None = None,
    return_final_states: bool = True,
    dtype: torch.dtype = torch.float64,
    activation_dtype: torch.dtype | None = None,
) -> tuple[Tensor, Tensor | None, Tensor | None]:
    """Split, convolve xBC, run the recurrence, gate and normalise.

    Args:
        zxbcdt: `[T, J]`, the input projection: `z [HP] | x [HP] | B [GN] | C [GN] | dt [H]`.
        conv_weight: `[conv_dim, W]` over `x | B | C`.
        conv_bias: `[conv_dim]` or None.
        dt_bias, A_log, D: `[H]`; `A = -exp(A_log)`.
        norm_weight: `[HP]`; the norm's groups are HP / G wide.
        n_groups, head_dim, state_size: G, P, N.
        chunk_size: no effect, see `ssd`.
        dt_limit: smallest and largest step.
        eps: of the gated norm.
        layout: where documents start; only `layout.lengths` is read.
        conv_states: `[n_docs, conv_dim, W]` or None.
        ssm_states: `[n_docs, H, P, N]` or None.
        return_final_states: whether the second and the third result are wanted.
        dtype: what everything is computed and returned in; float64 is the truth.
        activation_dtype: what tensors are rounded to on the way from one part to the next, which a
            model in bf16 does and the truth does not; None is `dtype`.

    Returns:
        y `[T, HP]` and the two final states or None twice, in `dtype`.
    """
    heads = A_log.shape[0]
    inner, group_width = heads * head_dim, n_groups * state_size
    z, xBC, dt = zxbcdt.split([inner, inner + 2 * group_width, heads], dim=1)
    xBC, conv_states = causal_conv1d(
        xBC,
        conv_weight,
        conv_bias,
        layout=layout,
        initial_states=conv_states,
        return_final_states=True,
        dtype=dtype,
    )
    x, B, C = xBC.to(activation_dtype or dtype).split([inner, group_width, group_width], dim=1)
    y, ssm_states = ssd(
        x.unflatten(1, (heads, head_dim)),
        dt,
        -torch.exp(A_log.to(dtype)),
        B.unflatten(1, (n_groups, state_size)),
        C.unflatten(1, (n_groups, state_size)),
        D=D,
        dt_bias=dt_bias,
        dt_limit=dt_limit,
        layout=layout,
        initial_states=ssm_states,
        dtype=dtype,
    )
    y = y.to(activation_dtype or dtype).flatten(1)
    y = gated_rms_norm(y, z, norm_weight, inner // n_groups, eps, dtype=dtype)
    return (y, conv_states, ssm_states) if return_final_states else (y, None, None)
