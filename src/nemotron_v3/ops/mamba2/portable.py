"""Everything of a Mamba-2 mixer between its projections, in plain PyTorch.

Letters: T packed tokens, n_docs documents, H heads, P head width, G groups, N state, W conv taps,
conv_dim = H*P + 2*G*N convolved channels; the packed projection is
`z [H*P] | x [H*P] | B [G*N] | C [G*N] | dt [H]`.

The parts are one node of autograd's graph: each writes its gradient into its own columns of that of
the projection, which three nodes would give as pieces to be put together.
"""

from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from nemotron_v3.layout import SequenceLayout
from nemotron_v3.ops.causal_conv1d import portable as conv
from nemotron_v3.ops.causal_conv1d import portable_backward as conv_gradients
from nemotron_v3.ops.common.precision import WIDE, needs_grad
from nemotron_v3.ops.common.step_sizes import step_sizes
from nemotron_v3.ops.gated_rms_norm import portable as gated
from nemotron_v3.ops.ssd import portable as ssd
from nemotron_v3.ops.ssd import portable_backward as ssd_gradients


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
) -> tuple[Tensor, Tensor | None, Tensor | None]:
    sizes = _Sizes(A_log.shape[0], head_dim, n_groups, state_size)
    _, xBC, _ = sizes.split(zxbcdt)
    borders = conv.borders_of(layout, conv_weight.shape[1])
    tiles = ssd.tiles_of(layout, sizes.by_head(xBC)[0], chunk_size)
    A = -torch.exp(A_log.to(WIDE[A_log.dtype]))
    tensors = zxbcdt, conv_weight, conv_bias, dt_bias, A, D, norm_weight, conv_states, ssm_states
    settings = _Settings(sizes, borders, tiles, dt_limit, eps, needs_grad(*tensors))
    y, final_ssm = _Core.apply(*tensors, settings)
    if not return_final_states:
        return y, None, None
    return y, conv.final_states(xBC, conv_states, borders), final_ssm


class _Sizes(NamedTuple):
    H: int
    P: int
    G: int
    N: int

    def split(self, zxbcdt: Tensor) -> tuple[Tensor, ...]:
        """z `[T, H*P]`, xBC `[T, conv_dim]` and dt `[T, H]`, views."""
        H, P, G, N = self
        return zxbcdt.split_with_sizes([H * P, H * P + 2 * G * N, H], -1)

    def by_head(self, xBC: Tensor) -> list[Tensor]:
        """x `[T, H, P]`, B and C `[T, G, N]`, views."""
        H, P, G, N = self
        x, B, C = xBC.split_with_sizes([H * P, G * N, G * N], -1)
        return [x.unflatten(-1, (H, P)), B.unflatten(-1, (G, N)), C.unflatten(-1, (G, N))]


class _Settings(NamedTuple):
    sizes: _Sizes
    borders: conv.Borders
    tiles: ssd.Tiles
    dt_limit: tuple[float, float]
    eps: float
    keep: bool  # what the backward pass needs


class _Core(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        zxbcdt: Tensor,
        conv_weight: Tensor,
        conv_bias: Tensor | None,
        dt_bias: Tensor,
        A: Tensor,
        D: Tensor,
        norm_weight: Tensor,
        conv_states: Tensor | None,
        ssm_states: Tensor | None,
        settings: _Settings,
    ) -> tuple[Tensor, Tensor]:
        sizes, borders, tiles, dt_limit, eps, keep = settings
        z, xBC, dt = sizes.split(zxbcdt)
        xBC = conv.convolve(xBC, conv_weight, conv_bias, conv_states, borders, "silu")
        x, B, C = sizes.by_head(xBC)
        dt = step_sizes(dt, dt_bias, dt_limit)
        y, final, kept = ssd.scan(x, dt, A, B, C, D, ssm_states, tiles, keep)
        y = y.flatten(-2)
        ctx.set_materialize_grads(False)
        ctx.save_for_backward(
            *(zxbcdt, conv_weight, conv_bias, dt_bias, A, D, norm_weight, conv_states),
            *(xBC, y, *kept),
        )
        ctx.initial_dtype = None if ssm_states is None else ssm_states.dtype
        ctx.settings = settings
        out = gated.normalise(y, z, norm_weight, sizes.H * sizes.P // sizes.G, eps)
        return out, final

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, dout: Tensor | None, dfinal: Tensor | None) -> tuple[Tensor | None, ...]:
        saved = ctx.saved_tensors  # once: a checkpoint hands them out one time
        inputs, (xBC, y, *kept) = saved[:8], saved[8:]
        zxbcdt, conv_weight, conv_bias, dt_bias, A, D, norm_weight, conv_states = inputs
        sizes, borders, tiles, dt_limit, eps, _ = ctx.settings
        z, conv_inputs, dt = sizes.split(zxbcdt)
        dzxbcdt = torch.empty_like(zxbcdt, memory_format=torch.contiguous_format)
        dz, dinputs, ddt = sizes.split(dzxbcdt)

        dy = torch.empty_like(y)
        group = sizes.H * sizes.P // sizes.G
        dout = torch.zeros_like(y) if dout is None else dout
        dnorm = gated.backward(y, z, norm_weight, group, eps, dout, dy, dz)

        with torch.enable_grad():
            raw = [t.detach().requires_grad_() for t in (dt, dt_bias)]
            steps = step_sizes(raw[0], raw[1], dt_limit)
        x, B, C = sizes.by_head(xBC)
        dxBC = torch.empty_like(xBC)
        dsteps, dA, dD, dssm = ssd_gradients.backward(
            *(x, steps.detach(), A, B, C, D, ctx.initial_dtype),
            kept,
            tiles,
            dy.unflatten(-1, (sizes.H, sizes.P)),
            dfinal,
            sizes.by_head(dxBC),
        )
        of_dt, ddt_bias = torch.autograd.grad(steps, raw, dsteps)
        ddt.copy_(of_dt)

        dweight, dbias, dconv = conv_gradients.backward(
            conv_inputs, conv_weight, conv_bias, conv_states, borders, "silu", dxBC, dinputs
        )
        return dzxbcdt, dweight, dbias, ddt_bias, dA, dD, dnorm, dconv, dssm, None
