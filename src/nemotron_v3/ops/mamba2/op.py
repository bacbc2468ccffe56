"""The public fused core of a Mamba-2 mixer: everything between `in_proj` and `out_proj`."""

from collections.abc import Callable, Sequence
from functools import partial
from typing import Any

import torch
from torch import Tensor

from nemotron_v3.layout import SequenceLayout
from nemotron_v3.ops.common.exchange import StateExchange
from nemotron_v3.ops.common.host import refuse_dtypes, refuse_state
from nemotron_v3.ops.common.no_tokens import of_no_tokens
from nemotron_v3.ops.common.precision import WIDE, as_promised
from nemotron_v3.ops.common.selfcheck import Check
from nemotron_v3.ops.mamba2 import portable, reference
from nemotron_v3.ops.mamba2.arguments import Options, Tensors
from nemotron_v3.ops.registry import Op


def _kernels() -> Callable[..., tuple[Tensor, Tensor | None, Tensor | None]]:
    from nemotron_v3.ops.mamba2.kernels import mamba2

    return mamba2


def _refusal(dtypes: Sequence[torch.dtype], taps: int, head_dim: int, state: int) -> str | None:
    if refusal := refuse_state(dtypes[0], head_dim, state):
        return refusal
    if not 2 <= taps <= 8:
        return f"it is made for 2 to 8 taps, and {taps} are given"
    return refuse_dtypes(dtypes)


def _exchanged(*args: Any, **options: Any) -> Tensor:
    # Imported here: its parts are ops of their own, which import this one's neighbours.
    from nemotron_v3.ops.mamba2.exchanged import mamba2

    return mamba2(*args, **options)


def _exchanged_kernels() -> Callable[..., Tensor]:
    from nemotron_v3.ops.mamba2.kernels.exchanged import mamba2

    return mamba2


_EXCHANGED = Op(
    "mamba2 with an exchange",
    reference=partial(_exchanged, impl="reference"),
    portable=_exchanged,
    kernels=_exchanged_kernels,
    refuse=_refusal,
)
_OP = Op(
    "mamba2",
    reference=reference.mamba2,
    portable=portable.mamba2,
    kernels=_kernels,
    refuse=_refusal,
    check=Check("pack"),
)


@_OP.public
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
    exchange: StateExchange | None = None,
    impl: str = "auto",
) -> tuple[Tensor, Tensor | None, Tensor | None]:
    """Convolution + SiLU, scan, skip, gate and grouped norm on the packed projection.

    Letters: T packed tokens, n_docs documents, H heads, P head width, G groups, N state, W conv
    taps, conv_dim = H*P + 2*G*N convolved channels.

    Args:
        zxbcdt: `[T, 2*H*P + 2*G*N + H]`, in the order z, x, B, C, dt.
        conv_weight: `[conv_dim, W]`. conv_bias: `[conv_dim]` or None.
        dt_bias, A_log, D: `[H]`; the decay is `A = -exp(A_log)`.
        norm_weight: `[H*P]`, in G groups.
        n_groups, head_dim, state_size: G, P, N.
        chunk_size, dt_limit: see `ssd`.
        eps: of the norm.
        layout: where the documents start.
        conv_states: `[n_docs, conv_dim, W]`, ssm_states: `[n_docs, H, P, N]`: the states before
            each document, zeros by default.
        return_final_states: False where they are not needed: the SSM's then cost nothing, and the
            conv's a copy of W columns a document.
        exchange: see `ssd`; then no final states come back.
        impl: see `nemotron_v3.ops`.

    Returns:
        `y` `[T, H*P]` in `zxbcdt`'s dtype, and both states after each document: the conv's in
        `zxbcdt`'s dtype, the SSM's in fp32 or wider; or None twice. All are
        differentiable.

    Raises:
        ValueError: a projection whose width is not the one these sizes give, and what
            `causal_conv1d`, `ssd` and `gated_rms_norm` raise.
    """
    heads = A_log.shape[0]
    width = 2 * heads * head_dim + 2 * n_groups * state_size + heads
    if zxbcdt.dim() != 2 or zxbcdt.shape[1] != width:
        raise ValueError(
            f"zxbcdt has shape {tuple(zxbcdt.shape)}: {heads} heads of width {head_dim} with "
            f"{n_groups} groups of state {state_size} need (tokens, {width})"
        )
    tensors = Tensors(zxbcdt, conv_weight, conv_bias, dt_bias, A_log, D, norm_weight)
    options = Options(n_groups, head_dim, state_size, chunk_size, dt_limit, eps)
    sizes = conv_weight.shape[1], head_dim, state_size
    if exchange is not None:
        if ssm_states is not None:
            raise ValueError("ssm_states are what an exchange gives: leave one of them out")
        run = _EXCHANGED.pick(impl, tensors, *sizes)
        y = run(tensors, options, layout, conv_states, exchange)
        y = y if zxbcdt.shape[0] else of_no_tokens(y, *tensors[1:])
        return y, None, None
    run = _OP.pick(impl, (*tensors, conv_states, ssm_states), *sizes)
    results = run(
        *tensors,
        **options._asdict(),
        layout=layout,
        conv_states=conv_states,
        ssm_states=ssm_states,
        return_final_states=return_final_states,
    )
    if not zxbcdt.shape[0]:
        results = (of_no_tokens(results[0], *tensors[1:]), *results[1:])
    return as_promised(results, zxbcdt.dtype, zxbcdt.dtype, WIDE[zxbcdt.dtype])
