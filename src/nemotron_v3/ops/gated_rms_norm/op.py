"""The public gated, grouped RMS normalisation."""

from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from nemotron_v3.ops.common.host import refuse_dtypes
from nemotron_v3.ops.common.selfcheck import Check
from nemotron_v3.ops.gated_rms_norm import portable, reference
from nemotron_v3.ops.registry import Op


def _kernels() -> Callable[..., Tensor]:
    from nemotron_v3.ops.gated_rms_norm.kernels import gated_rms_norm

    return gated_rms_norm


def _refusal(dtypes: Sequence[torch.dtype | None], group_size: int) -> str | None:
    if group_size > 65536:
        return f"a group must fit into one program, and has {group_size} columns"
    return refuse_dtypes(dtypes)


_OP = Op(
    "gated_rms_norm",
    reference=reference.gated_rms_norm,
    portable=portable.gated_rms_norm,
    kernels=_kernels,
    refuse=_refusal,
    check=Check("odd-groups"),
)


@_OP.public
def gated_rms_norm(
    y: Tensor,
    z: Tensor | None,
    weight: Tensor,
    group_size: int,
    eps: float = 1e-5,
    *,
    impl: str = "auto",
) -> Tensor:
    """Gate first, then normalise each group of channels by its own RMS (Mamba-2, section 7).

    `v = y * silu(z)`; each run of `group_size` channels of `v` is divided by
    `sqrt(mean(v^2) + eps)` and multiplied by its weight. All of it in fp32 or wider, one cast last.

    Args:
        y: `[..., D]`, the mixer's output before the gate.
        z: `[..., D]`, the gate, or None for no gate.
        weight: `[D]`.
        group_size: channels that share one RMS; divides D.
        impl: see `nemotron_v3.ops`.

    Returns:
        `[..., D]` in `y`'s dtype.

    Raises:
        ValueError: widths that differ, or that `group_size` does not divide.
    """
    width = weight.shape[0]
    if y.shape[-1:] != weight.shape or (z is not None and z.shape != y.shape):
        gate = None if z is None else tuple(z.shape)
        raise ValueError(
            f"input of shape {tuple(y.shape)} and gate of shape {gate} do not fit a norm of width "
            f"{width}: both end in {width}"
        )
    if group_size < 1 or width % group_size:
        raise ValueError(f"group_size {group_size} does not divide the width {width}")
    run = _OP.pick(impl, (y, z, weight), group_size)
    out = run(y, z, weight, group_size, eps)
    return out if out.dtype == y.dtype else out.to(y.dtype)
