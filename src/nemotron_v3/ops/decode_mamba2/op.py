"""The public core of a Mamba-2 mixer for one token of each slot of a fixed batch."""

import math
from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from nemotron_v3.ops.common.host import refuse_dtypes
from nemotron_v3.ops.common.precision import WIDE
from nemotron_v3.ops.common.slots import check_out, check_slots
from nemotron_v3.ops.decode_mamba2 import portable, reference
from nemotron_v3.ops.registry import Op


def _kernels() -> Callable:
    from nemotron_v3.ops.decode_mamba2.kernels import decode_mamba2

    return decode_mamba2


def _refusal(dtypes: Sequence[torch.dtype | None], state: int) -> str | None:
    """Why the kernel cannot take a call, or None."""
    if state > 1024:
        return f"a state of {state} columns is wider than a program's 1024"
    return refuse_dtypes(dtypes)


_OP = Op(
    "decode_mamba2",
    reference=reference.decode_mamba2,
    portable=portable.decode_mamba2,
    kernels=_kernels,
    refuse=_refusal,
)


@_OP.public
@torch.no_grad()
def decode_mamba2(
    projected: Tensor,
    conv: Tensor,
    ssm: Tensor,
    positions: Tensor,
    active: Tensor,
    *,
    conv_weight: Tensor,
    conv_bias: Tensor | None,
    dt_bias: Tensor,
    A_log: Tensor,
    D: Tensor,
    n_groups: int,
    dt_limit: tuple[float, float] = (0.0, math.inf),
    out: Tensor | None = None,
    impl: str = "auto",
) -> Tensor:
    """Convolution, recurrence and gate of one token a slot, in fixed buffers (arXiv 2405.21060).

    What `mamba2_step` computes before its norm, in the form that a CUDA graph holds: every slot of
    the batch is there at every step, and which of them move on, and from where, is told by tensors.

    Letters: R slots, H heads, P head width, G groups, N state, W conv taps, C = H*P + 2*G*N
    convolved channels.

    Args:
        projected: `[R, 2*H*P + 2*G*N + H]`, in the order z, x, B, C, dt.
        conv: `[R, W, C]`, contiguous, the last W inputs before activation: that of position p
            stands at place `p % W` (`ring_of` makes it); zeros before the first token.
        ssm: `[R, H, P, N]`, contiguous; rounded once if it is narrower than fp32. Both states are
            updated in place where a slot is active.
        positions: int64 `[R]`, the tokens that each slot held before this one.
        active: bool or integers `[R]`; a slot moves on where it is not 0.
        conv_weight: `[C, W]`; the last tap is the current token's. conv_bias: `[C]` or None.
        dt_bias, A_log, D: `[H]`; `A = -exp(A_log)`. n_groups: G.
        dt_limit: smallest and largest step.
        out: where to write the result; a new tensor by default.
        impl: see `nemotron_v3.ops`.

    Returns:
        `y * silu(z)` `[R, H*P]` in fp32 or wider, before the norm; 0 for a slot that is not active.

    Raises:
        ValueError: shapes or dtypes that do not fit, states that are not contiguous.
    """
    _check(projected, conv, ssm, positions, active, n_groups)
    _check_weights(conv, ssm, conv_weight, conv_bias, dt_bias, A_log, D)
    R, H, P, _ = ssm.shape
    kind = WIDE[projected.dtype]
    out = projected.new_empty(R, H * P, dtype=kind) if out is None else out
    check_out(out, (R, H * P), kind)
    weights = (conv_weight, conv_bias, dt_bias, A_log, D)
    run = _OP.pick(impl, (projected, conv, ssm, *weights), ssm.shape[3])
    return run(
        projected,
        conv,
        ssm,
        positions,
        active,
        conv_weight=conv_weight,
        conv_bias=conv_bias,
        dt_bias=dt_bias,
        A_log=A_log,
        D=D,
        n_groups=n_groups,
        dt_limit=dt_limit,
        out=out,
    )


def _check(
    projected: Tensor,
    conv: Tensor,
    ssm: Tensor,
    positions: Tensor,
    active: Tensor,
    n_groups: int,
) -> None:
    if ssm.dim() != 4 or conv.dim() != 3:
        raise ValueError(
            f"ssm {tuple(ssm.shape)} and conv {tuple(conv.shape)} must be (slots, heads, head "
            "width, state) and (slots, taps, channels)"
        )
    R, H, P, N = ssm.shape
    if n_groups < 1 or H % n_groups:
        raise ValueError(f"n_groups {n_groups} does not divide the {H} heads")
    channels = H * P + 2 * n_groups * N
    expected = (R, H * P + channels + H)
    if tuple(projected.shape) != expected or (conv.shape[0], conv.shape[2]) != (R, channels):
        raise ValueError(
            f"projected {tuple(projected.shape)} and conv {tuple(conv.shape)} do not fit ssm "
            f"{tuple(ssm.shape)}: {expected} and ({R}, taps, {channels}) are needed"
        )
    if not (conv.is_contiguous() and ssm.is_contiguous()):
        raise ValueError("conv and ssm are updated in place and must be contiguous")
    check_slots(R, positions, active)


def _check_weights(
    conv: Tensor, ssm: Tensor, conv_weight: Tensor, conv_bias: Tensor | None, *of_heads: Tensor
) -> None:
    _, taps, channels = conv.shape
    if tuple(conv_weight.shape) != (channels, taps):
        raise ValueError(f"conv_weight {tuple(conv_weight.shape)} must be ({channels}, {taps})")
    if conv_bias is not None and tuple(conv_bias.shape) != (channels,):
        raise ValueError(f"conv_bias {tuple(conv_bias.shape)} must be ({channels},)")
    for name, tensor in zip(("dt_bias", "A_log", "D"), of_heads, strict=True):
        if tuple(tensor.shape) != (ssm.shape[1],):
            raise ValueError(f"{name} {tuple(tensor.shape)} must be ({ssm.shape[1]},)")
