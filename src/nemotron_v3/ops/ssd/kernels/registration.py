"""The scan as an op of `torch.library`, with its autograd formula.

Letters: T packed tokens, n_docs documents, n_chunks chunks, H heads, P head width, G groups, N
state.
"""

from typing import NamedTuple

import torch
from torch import Tensor

from nemotron_v3.layout import SequenceLayout
from nemotron_v3.ops.common.host import (
    absent,
    contiguous,
    empty_like,
    gradients_of,
    register,
    schema,
    unit_stride,
)
from nemotron_v3.ops.ssd.kernels import launch
from nemotron_v3.ops.ssd.kernels.tables import Blocks, Tables, chunk_tables


class Arguments(NamedTuple):
    """Of the forward op; the last four are `Tables`."""

    x: Tensor
    dt: Tensor
    A: Tensor
    B: Tensor
    C: Tensor
    D: Tensor | None
    dt_bias: Tensor | None
    initial_states: Tensor | None
    low: float
    high: float
    final: bool
    chunk_start: Tensor
    chunk_end: Tensor
    document_chunks: Tensor
    cu_seqlens: Tensor

    @property
    def inputs(self) -> launch.Inputs:
        """As rows of tokens: views where heads are neighbours."""
        x, dt, A, B, C, *others = self[:8]
        rows = (_rows(x), unit_stride(dt), A.contiguous(), _rows(B), _rows(C))
        return launch.Inputs(*rows, *map(contiguous, others))

    @property
    def steps(self) -> launch.Steps:
        return launch.Steps(self.low, self.high, log_A=False)

    @property
    def tables(self) -> Tables:
        return Tables(*self[11:])

    @property
    def sizes(self) -> tuple[int, int, int]:
        """H, P, N."""
        return *self.x.shape[1:], self.B.shape[2]

    @property
    def blocks(self) -> Blocks:
        H, P, N = self.sizes
        return Blocks.of(self.x.dtype, P, N, H // self.B.shape[1])


class Upstream(NamedTuple):
    """What the backward op is given before `Arguments`: gradients, and what the forward kept."""

    dy: Tensor
    dfinal_states: Tensor | None
    prev_states: Tensor
    dA_cumsum: Tensor


def _rows(x: Tensor) -> Tensor:
    """`[T, H, P]` -> `[T, H*P]`."""
    return unit_stride(x.flatten(1))


def _outputs(a: Arguments) -> launch.Outputs:
    final = launch.document_states(a.x, *a.sizes, a.tables) if a.final else None
    prev_states = launch.prev_states(a.x, *a.sizes, a.tables)
    return launch.Outputs(empty_like(a.x), final, prev_states, launch.dA_cumsum(a.x, a.sizes[0]))


def _returned(outputs: launch.Outputs) -> launch.Outputs:
    if outputs.final_states is None:
        return outputs._replace(final_states=absent(outputs.y, torch.float32))
    return outputs


def _forward(*args) -> launch.Outputs:
    a = Arguments(*args)
    outputs = _outputs(a)
    flat = outputs._replace(y=outputs.y.flatten(1))
    launch.forward(a.inputs, a.steps, a.tables, a.blocks, flat)
    return _returned(outputs)


def _forward_fake(*args) -> launch.Outputs:
    return _returned(_outputs(Arguments(*args)))


def _gradients(a: Arguments) -> launch.Gradients:
    D, dt_bias = (a.A if t is None else t for t in (a.D, a.dt_bias))
    dinitial = None
    if a.initial_states is not None:
        dinitial = launch.document_states(a.x, *a.sizes, a.tables)
    return launch.Gradients(*map(empty_like, (a.x, a.dt, a.A, a.B, a.C, D, dt_bias)), dinitial)


def _returned_gradients(gradients: launch.Gradients) -> launch.Gradients:
    if gradients.dinitial_states is None:
        return gradients._replace(dinitial_states=absent(gradients.dx))
    return gradients


def _backward(*args) -> launch.Gradients:
    upstream, a = Upstream(*args[:4]), Arguments(*args[4:])
    gradients = _gradients(a)
    dx, dB, dC = (t.flatten(1) for t in (gradients.dx, gradients.dB, gradients.dC))
    launch.backward(
        *(a.inputs, a.steps, a.tables, a.blocks),
        launch.Kept(*upstream[2:]),
        _rows(upstream.dy),
        contiguous(upstream.dfinal_states),
        gradients._replace(dx=dx, dB=dB, dC=dC),
    )
    return _returned_gradients(gradients)


def _backward_fake(*args) -> launch.Gradients:
    return _returned_gradients(_gradients(Arguments(*args[4:])))


def _setup_context(ctx, inputs, output) -> None:
    a, outputs = Arguments(*inputs), launch.Outputs(*output)
    kept = outputs.prev_states, outputs.dA_cumsum
    ctx.save_for_backward(*kept, *a[:8], *a.tables)
    ctx.options = a.low, a.high, a.final
    ctx.mark_non_differentiable(*kept, *(() if a.final else (outputs.final_states,)))
    ctx.set_materialize_grads(False)


def _autograd(ctx, dy, dfinal_states, *_) -> Arguments:
    saved = ctx.saved_tensors
    a = Arguments(*saved[2:10], *ctx.options, *saved[10:])
    if dy is None:
        dy = torch.zeros_like(a.x)
    g = launch.Gradients(*_backward_op(dy, dfinal_states, *saved[:2], *a))
    initial = a.initial_states
    return gradients_of(
        Arguments,
        **{"x": g.dx, "dt": g.ddt, "A": g.dA, "B": g.dB, "C": g.dC},
        D=None if a.D is None else g.dD,
        dt_bias=None if a.dt_bias is None else g.ddt_bias,
        initial_states=None if initial is None else g.dinitial_states.to(initial.dtype),
    )


_backward_op = register(
    schema("ssd_backward", Upstream, Arguments, results=8), _backward, _backward_fake
)
_forward_op = register(
    schema("ssd", Arguments, results=4),
    _forward,
    _forward_fake,
    setup_context=_setup_context,
    backward=_autograd,
)


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
) -> tuple[Tensor, Tensor | None]:
    blocks = Blocks.of(x.dtype, x.shape[2], B.shape[2], x.shape[1] // B.shape[1])
    low, high = map(float, dt_limit)
    y, final_states, *_ = _forward_op(
        *(x, dt, A, B, C, D, dt_bias, initial_states, low, high, return_final_states),
        *chunk_tables(layout, blocks.sizes.Q),
    )
    return y, final_states if return_final_states else None
