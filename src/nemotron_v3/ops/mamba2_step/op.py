"""The public core of a Mamba-2 mixer for one token a row, for decoding."""

import torch
from torch import Tensor

from nemotron_v3.ops.common.selfcheck import Check
from nemotron_v3.ops.mamba2_step import portable, reference
from nemotron_v3.ops.registry import Op

_OP = Op(
    "mamba2_step",
    reference=reference.mamba2_step,
    portable=portable.mamba2_step,
    check=Check("one-token", cases_of="mamba2", adapt="of_one_token"),
)


@_OP.public
@torch.no_grad()
def mamba2_step(
    zxbcdt: Tensor,
    conv_weight: Tensor,
    conv_bias: Tensor | None,
    dt_bias: Tensor,
    A_log: Tensor,
    D: Tensor,
    norm_weight: Tensor,
    *,
    conv_state: Tensor,
    ssm_state: Tensor,
    n_groups: int,
    head_dim: int,
    state_size: int,
    dt_limit: tuple[float, float] = (0.0, float("inf")),
    eps: float = 1e-5,
    impl: str = "auto",
) -> Tensor:
    """`mamba2` for one token a row, with both states updated in place and no gradient.

    Letters: rows of a batch, H heads, P head width, G groups, N state, W conv taps, conv_dim =
    H*P + 2*G*N convolved channels.

    Args:
        zxbcdt: `[rows, 2*H*P + 2*G*N + H]`, in the order z, x, B, C, dt.
        conv_state: `[rows, conv_dim, W]`, the last W inputs before activation, newest last.
        ssm_state: `[rows, H, P, N]`.
        conv_weight, conv_bias, dt_bias, A_log, D, norm_weight, n_groups, head_dim, state_size,
            dt_limit, eps: as in `mamba2`.
        impl: see `nemotron_v3.ops`.

    Returns:
        `y` `[rows, H*P]` in `zxbcdt`'s dtype.

    Raises:
        ValueError: states of another batch or size.
    """
    rows, heads = zxbcdt.shape[0], A_log.shape[0]
    conv_shape = (rows, *conv_weight.shape)
    ssm_shape = (rows, heads, head_dim, state_size)
    if conv_state.shape != conv_shape or ssm_state.shape != ssm_shape:
        raise ValueError(
            f"conv_state {tuple(conv_state.shape)} and ssm_state {tuple(ssm_state.shape)} do not "
            f"fit {rows} rows: {conv_shape} and {ssm_shape} are needed"
        )
    run = _OP.pick(impl, (zxbcdt,))
    y = run(
        zxbcdt,
        conv_weight,
        conv_bias,
        dt_bias,
        A_log,
        D,
        norm_weight,
        conv_state=conv_state,
        ssm_state=ssm_state,
        n_groups=n_groups,
        head_dim=head_dim,
        state_size=state_size,
        dt_limit=dt_limit,
        eps=eps,
    )
    return y if y.dtype == zxbcdt.dtype else y.to(zxbcdt.dtype)
