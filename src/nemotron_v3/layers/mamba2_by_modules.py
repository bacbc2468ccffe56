"""The core of a Mamba-2 mixer with its convolution and its norm called as modules.

`ops.mamba2` reads the weights of both and does their work itself. Where somebody looks into one of
them, or has put something else in its place, they are called here instead: hooks, adapters and
other modules act, at the price of a grid of all documents and of several kernels in the place of
one.

Letters: T packed tokens, D documents, L the longest one, H heads, P head width, G groups, N state,
W conv taps, C convolved channels.
"""

from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor

from nemotron_v3 import ops
from nemotron_v3.layout import SequenceLayout
from nemotron_v3.ops.common.exchange import StateExchange


def mamba2_by_modules(
    zxbcdt: Tensor,
    conv1d: Callable[[Tensor], Tensor],
    norm: Callable[[Tensor, Tensor], Tensor],
    dt_bias: Tensor,
    A_log: Tensor,
    D: Tensor,
    *,
    taps: int,
    n_groups: int,
    head_dim: int,
    state_size: int,
    chunk_size: int,
    dt_limit: tuple[float, float],
    layout: SequenceLayout,
    conv_states: Tensor | None = None,
    ssm_states: Tensor | None = None,
    return_final_states: bool = True,
    exchange: StateExchange | None = None,
    act: Callable[[Tensor], Tensor] = F.silu,
    impl: str = "auto",
) -> tuple[Tensor, Tensor | None, Tensor | None]:
    """What `ops.mamba2` computes, by two modules.

    Args:
        conv1d: `[D, C, L]` -> `[D, C, at least L]`, padded by `taps - 1` on the left: one document
            a row, its tokens first. With `conv_states` a row begins with their last W - 1 columns.
        norm: `[T, H*P]` and the gate `[T, H*P]` -> `[T, H*P]`.
        taps: W.
        act: of what is convolved, `[T, C]`.
        zxbcdt, dt_bias, A_log, D, n_groups, head_dim, state_size, chunk_size, dt_limit, layout,
            conv_states, ssm_states, return_final_states, exchange, impl: as `ops.mamba2` has them.

    Returns:
        What `ops.mamba2` returns.
    """
    inner, group_width = len(A_log) * head_dim, n_groups * state_size
    z, xBC, dt = zxbcdt.split([inner, inner + 2 * group_width, len(A_log)], dim=-1)
    grid = _Grid(xBC, layout)
    y = grid.convolved(conv1d, taps, conv_states)  # [T, C]
    x, B, C = act(y).split([inner, group_width, group_width], dim=-1)
    y, final_ssm = ops.ssd(
        x.unflatten(-1, (-1, head_dim)),
        dt,
        -torch.exp(A_log.to(torch.promote_types(A_log.dtype, torch.float32))),
        B.unflatten(-1, (n_groups, state_size)),
        C.unflatten(-1, (n_groups, state_size)),
        D=D,
        dt_bias=dt_bias,
        dt_limit=dt_limit,
        layout=layout,
        chunk_size=chunk_size,
        initial_states=ssm_states,
        return_final_states=return_final_states,
        exchange=exchange,
        impl=impl,
    )
    y = norm(y.flatten(-2), z)
    if not return_final_states or exchange is not None:
        return y, None, None
    return y, grid.last(taps, conv_states), final_ssm


class _Grid:
    """Packed tokens `[T, C]` as `[D, C, L]`, one document a row, its tokens first."""

    def __init__(self, xBC: Tensor, layout: SequenceLayout):
        self.layout = layout
        self.rows = layout.seq_idx.long()
        first = layout.cu_seqlens[:-1].index_select(0, self.rows)
        self.columns = torch.arange(layout.num_tokens, device=xBC.device) - first
        shape = (layout.num_documents, max(1, *layout.lengths), xBC.shape[-1])
        by_token = xBC.new_zeros(shape).index_put((self.rows, self.columns), xBC)
        self.inputs = by_token.transpose(1, 2)

    def convolved(
        self, conv1d: Callable[[Tensor], Tensor], taps: int, states: Tensor | None
    ) -> Tensor:
        """What the module makes of each token, `[T, C]`."""
        inputs, before = self.inputs, 0
        if states is not None:
            before = taps - 1
            inputs = torch.cat([states[..., states.shape[-1] - before :].to(inputs), inputs], -1)
        return conv1d(inputs).transpose(1, 2)[self.rows, self.columns + before]

    def last(self, taps: int, states: Tensor | None) -> Tensor:
        """The last W inputs of each document `[D, C, W]`, those before it included."""
        D, C, _ = self.inputs.shape
        before = self.inputs.new_zeros(D, C, taps) if states is None else states.to(self.inputs)
        places = self.layout.cu_seqlens.diff()[:, None, None] + torch.arange(
            taps, device=self.inputs.device
        )
        return torch.cat([before, self.inputs], -1).gather(-1, places.expand(D, C, taps))
