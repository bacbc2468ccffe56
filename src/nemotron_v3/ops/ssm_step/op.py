"""The public single step of the Mamba-2 recurrence, for decoding."""

import torch
from torch import Tensor

from nemotron_v3.ops.registry import Op
from nemotron_v3.ops.ssm_step import portable, reference

_OP = Op("ssm_step", reference=reference.ssm_step, portable=portable.ssm_step)


@_OP.public
@torch.no_grad()
def ssm_step(
    state: Tensor,
    x: Tensor,
    dt: Tensor,
    A: Tensor,
    B: Tensor,
    C: Tensor,
    *,
    D: Tensor | None = None,
    dt_bias: Tensor | None = None,
    dt_limit: tuple[float, float] = (0.0, float("inf")),
    impl: str = "auto",
) -> Tensor:
    """`S <- exp(dt A) S + dt x B^T` in place, and `y = S C + D x`: `ssd` for one token a row.

    Letters: rows of a batch, H heads, P head width, G groups, N state. No gradient flows through
    it: `ssd` with initial states is the differentiable form.

    Args:
        state: `[rows, H, P, N]`, contiguous, updated in place; rounded once if it is narrower than
            fp32.
        x: `[rows, H, P]`. dt: `[rows, H]`. B, C: `[rows, G, N]`.
        A, D, dt_bias: `[H]`. dt_limit: as in `ssd`.
        impl: see `nemotron_v3.ops`.

    Returns:
        `y` `[rows, H, P]` in `x`'s dtype.

    Raises:
        ValueError: shapes that do not fit.
    """
    rows, heads, width, size = state.shape
    fits = (
        tuple(x.shape) == (rows, heads, width)
        and tuple(dt.shape) == (rows, heads)
        and B.shape == C.shape
        and B.shape[::2] == (rows, size)
        and heads % B.shape[1] == 0
    )
    if not fits:
        raise ValueError(
            f"x {tuple(x.shape)}, dt {tuple(dt.shape)}, B {tuple(B.shape)} and C {tuple(C.shape)} "
            f"do not fit a state of shape {tuple(state.shape)} (rows, heads, head width, state)"
        )
    run = _OP.pick(impl, (state,))
    y = run(state, x, dt, A, B, C, D=D, dt_bias=dt_bias, dt_limit=dt_limit)
    return y.to(x.dtype)
