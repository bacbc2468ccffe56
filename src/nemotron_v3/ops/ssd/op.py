"""The public state-space-duality scan."""

from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from nemotron_v3.layout import SequenceLayout
from nemotron_v3.ops.common.exchange import StateExchange
from nemotron_v3.ops.common.host import refuse_dtypes, refuse_mixed, refuse_state
from nemotron_v3.ops.common.precision import WIDE, as_promised, without_autocast
from nemotron_v3.ops.common.selfcheck import Check
from nemotron_v3.ops.registry import Op
from nemotron_v3.ops.ssd import exchanged, portable, reference


def _kernels() -> Callable[..., tuple[Tensor, Tensor | None]]:
    from nemotron_v3.ops.ssd.kernels import ssd

    return ssd


def _refusal(dtypes: Sequence[torch.dtype], head_dim: int, state: int) -> str | None:
    """Of x, B and C, which are multiplied with each other, and then the other tensors."""
    return (
        refuse_state(dtypes[0], head_dim, state)
        or refuse_dtypes(dtypes[3:])
        or refuse_mixed(dtypes[:3])
    )


_OP = Op(
    "ssd",
    reference=reference.ssd,
    portable=portable.ssd,
    kernels=_kernels,
    refuse=_refusal,
    check=Check("small-chunks"),
)


@_OP.public
@without_autocast
def ssd(
    x: Tensor,
    dt: Tensor,
    A: Tensor,
    B: Tensor,
    C: Tensor,
    *,
    D: Tensor | None = None,
    dt_bias: Tensor | None = None,
    dt_limit: tuple[float, float] = (0.0, float("inf")),
    layout: SequenceLayout,
    chunk_size: int = 128,
    initial_states: Tensor | None = None,
    return_final_states: bool = True,
    exchange: StateExchange | None = None,
    impl: str = "auto",
) -> tuple[Tensor, Tensor | None]:
    """The Mamba-2 recurrence, each document from its own initial state (arXiv 2405.21060).

    `S_t = exp(dt_t A) S_{t-1} + dt_t x_t B_t^T` and `y_t = S_t C_t + D x_t`, with
    `dt_t = clamp(softplus(dt_t + dt_bias), *dt_limit)`.

    Letters: T packed tokens, n_docs documents, H heads, P head width, G groups, N state.

    Args:
        x: `[T, H, P]`.
        dt: `[T, H]`, before bias and softplus.
        A: `[H]`, negative.
        B, C: `[T, G, N]`; head h reads group `h // (H / G)`.
        D: `[H]`, the skip connection, or None.
        dt_bias: `[H]` or None.
        dt_limit: bounds of dt after the softplus.
        layout: where the documents start.
        chunk_size: tokens of a chunk, at least 1. It changes no mathematics: the portable form on
            a CPU cuts tiles of at most so many, and of at most 64; kernels have a size of their
            own.
        initial_states: `[n_docs, H, P, N]`; zeros by default.
        return_final_states: False where they are not needed: then they cost nothing.
        exchange: for documents that are cut into pieces over several processes: computes the
            initial state of each piece here from what the pieces before it leave. Final states are
            then not returned (None).
        impl: see `nemotron_v3.ops`.

    Returns:
        `y` `[T, H, P]` in `x`'s dtype, and the state after each document `[n_docs, H, P, N]` in
        fp32 or wider (dt, decays and states are), or None. Both are differentiable in every tensor
        given.

    Raises:
        ValueError: shapes that do not fit, heads that the groups do not divide, a chunk size
            below 1.
    """
    _check(x, dt, A, B, C, layout, chunk_size, initial_states)
    if exchange is not None:
        if initial_states is not None:
            raise ValueError("initial_states are what an exchange gives: leave one of them out")
        options = {"D": D, "chunk_size": chunk_size, "impl": impl}
        options |= {"dt_bias": dt_bias, "dt_limit": dt_limit, "layout": layout}
        return exchanged.ssd(ssd, x, dt, A, B, C, **options, exchange=exchange)
    tensors = (x, B, C, dt, A, D, dt_bias, initial_states)
    run = _OP.pick(impl, tensors, x.shape[2], B.shape[2])
    results = run(
        x,
        dt,
        A,
        B,
        C,
        D=D,
        dt_bias=dt_bias,
        dt_limit=dt_limit,
        layout=layout,
        chunk_size=chunk_size,
        initial_states=initial_states,
        return_final_states=return_final_states,
    )
    return as_promised(results, x.dtype, WIDE[x.dtype])


def _check(
    x: Tensor,
    dt: Tensor,
    A: Tensor,
    B: Tensor,
    C: Tensor,
    layout: SequenceLayout,
    chunk_size: int,
    initial_states: Tensor | None,
) -> None:
    if x.dim() != 3 or x.shape[0] != layout.num_tokens:
        raise ValueError(
            f"x has shape {tuple(x.shape)}: (tokens, heads, head width) with {layout.num_tokens} "
            "tokens is needed"
        )
    T, H, P = x.shape
    if tuple(dt.shape) != (T, H) or tuple(A.shape) != (H,):
        raise ValueError(
            f"dt {tuple(dt.shape)} and A {tuple(A.shape)} do not fit {T} tokens of {H} heads"
        )
    if B.shape != C.shape or B.dim() != 3 or B.shape[0] != T or H % B.shape[1]:
        raise ValueError(
            f"B {tuple(B.shape)} and C {tuple(C.shape)} must both be ({T}, groups, state), with "
            f"groups a divisor of the {H} heads"
        )
    if chunk_size < 1:
        raise ValueError(f"chunk_size must be at least 1, got {chunk_size}")
    expected = (layout.num_documents, H, P, B.shape[2])
    if initial_states is not None and tuple(initial_states.shape) != expected:
        raise ValueError(
            f"initial_states has shape {tuple(initial_states.shape)}, needed is (documents, heads, "
            f"head width, state) = {expected}"
        )
