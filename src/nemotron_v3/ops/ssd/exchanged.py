"""The scan for context parallelism: pieces of documents exchange the states at their ends.

README.md, 'Parts', has the equations.

Letters: T packed tokens, n_docs pieces of documents, n tokens of one, H heads, P head width, G
groups, N state.

The states that the pieces end with are one product a piece. They are exchanged, and the scan begins
with what comes back; so every form of it can be the one that is used.
"""

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from nemotron_v3.layout import SequenceLayout
from nemotron_v3.ops.common.exchange import StateExchange
from nemotron_v3.ops.common.precision import WIDE
from nemotron_v3.ops.common.step_sizes import step_sizes


def ssd(
    scan: Callable[..., tuple[Tensor, Tensor | None]],
    x: Tensor,
    dt: Tensor,
    A: Tensor,
    B: Tensor,
    C: Tensor,
    *,
    dt_bias: Tensor | None,
    dt_limit: tuple[float, float],
    layout: SequenceLayout,
    exchange: StateExchange,
    **options: Any,
) -> tuple[Tensor, None]:
    """`scan`, a form of `ops.ssd`, of pieces whose states are exchanged."""
    steps = step_sizes(dt, dt_bias, dt_limit).to(WIDE[x.dtype])
    ends, decays = end_states(x, steps, A, B, layout)
    initial = _Exchange.apply(ends, decays, exchange)
    options |= {"dt_bias": dt_bias, "dt_limit": dt_limit, "layout": layout}
    options |= {"initial_states": initial, "return_final_states": False}
    y, _ = scan(x, dt, A, B, C, **options)
    return y, None


def end_states(
    x: Tensor, dt: Tensor, A: Tensor, B: Tensor, layout: SequenceLayout
) -> tuple[Tensor, Tensor]:
    """`sum_t e^(a_last - a_t) dt_t x_t B_t^T` of each piece `[n_docs, H, P, N]`, and `e^a_last`
    `[n_docs, H]`, in fp32 or wider.

    Args:
        dt: `[T, H]` after bias, softplus and limits.
    """
    dtype, G = WIDE[x.dtype], B.shape[1]
    ends, decays = [], []
    streams = (x.to(dtype), dt.to(dtype), B.to(dtype))
    for x, dt, B in zip(*(t.split(list(layout.lengths)) for t in streams), strict=True):
        a = (dt.double() * A.double()).cumsum(0)  # [n, H]; differences of large sums are taken
        last = a[-1] if len(a) else a.new_zeros(a.shape[1])
        weights = (last - a).exp().to(dtype) * dt
        traces = (x * weights[..., None]).unflatten(1, (G, -1)).flatten(2)  # [n, G, R*P]
        state = torch.bmm(traces.permute(1, 2, 0), B.transpose(0, 1))  # [G, R*P, N]
        ends.append(state.view(x.shape[1], x.shape[2], -1))
        decays.append(last.exp().to(dtype))
    return torch.stack(ends), torch.stack(decays)


class _Exchange(torch.autograd.Function):
    """The states that the pieces begin with. One exchange in each direction."""

    @staticmethod
    def forward(ctx: Any, ends: Tensor, decays: Tensor, exchange: StateExchange) -> Tensor:
        initial = exchange.before(ends, decays)
        ctx.save_for_backward(initial)
        ctx.exchange = exchange
        return initial

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, dinitial: Tensor) -> tuple[Tensor, Tensor, None]:
        (initial,) = ctx.saved_tensors
        behind = ctx.exchange.behind(dinitial)
        return behind, (initial * behind).sum((-1, -2)), None
