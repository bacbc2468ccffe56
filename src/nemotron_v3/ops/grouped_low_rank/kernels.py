"""Experts with low-rank updates in Triton, as an op of `torch.library` (README.md).

The kernels are those of the experts. A product with `W + α B A` is the product with W, to whose
accumulator the rows' thin products, `α A` times each, are added times B.

Letters: T tokens, K choices a token, R = T*K routed rows, E experts, X width, F expert width; r and
s ranks of the updates of up and down.
"""

from typing import NamedTuple

import torch
from torch import Tensor

from nemotron_v3.ops.common.host import (
    empty_like,
    gradients_of,
    place_for,
    register,
    schema,
    unit_stride,
)
from nemotron_v3.ops.experts.kernels import launch
from nemotron_v3.ops.experts.kernels.launch import LowRank, Sorted
from nemotron_v3.ops.experts.kernels.tables import Plan


class Stack(NamedTuple):
    """A stack of matrices and its update: `weight[e] + scale b[e] a[e]`; or their gradients."""

    weight: Tensor
    a: Tensor
    b: Tensor


class Arguments(NamedTuple):
    """Of the forward op."""

    x: Tensor
    indices: Tensor
    weights: Tensor
    up: Tensor
    down: Tensor
    up_a: Tensor
    up_b: Tensor
    down_a: Tensor
    down_b: Tensor
    scale: float

    @property
    def up_stack(self) -> Stack:
        return Stack(self.up, self.up_a, self.up_b)

    @property
    def down_stack(self) -> Stack:
        return Stack(self.down, self.down_a, self.down_b)


class Outputs(NamedTuple):
    """All but y are kept: the rows' hidden values and thin products, and where they lie."""

    y: Tensor
    hidden: Tensor
    up_rows: Tensor
    down_rows: Tensor
    sorted_weights: Tensor
    table: Tensor


def _contiguous(stack: Stack) -> Stack:
    return Stack(*[m.contiguous() for m in stack])


def _outputs(a: Arguments) -> Outputs:
    R = a.indices.shape[0] * a.indices.shape[1]
    where = launch.sorted_rows(a.x, R, a.up.shape[0], Plan.of(a.x.dtype).tile)
    rows = [
        torch.empty((R, width), dtype=a.x.dtype, device=a.x.device)
        for width in (a.up.shape[1], a.up_a.shape[1], a.down_a.shape[1])
    ]
    return Outputs(empty_like(a.x), *rows, where.weights, where.table)


def _forward(*args) -> Outputs:
    a = Arguments(*args)
    o, plan = _outputs(a), Plan.of(a.x.dtype)
    x, weights = unit_stride(a.x), a.weights.contiguous()
    up, down = _contiguous(a.up_stack), _contiguous(a.down_stack)
    where = Sorted.of(o.table, o.sorted_weights, up.weight.shape[0])
    launch.sort_rows(a.indices.contiguous(), weights, plan.tile, where)
    launch.thin_product(plan, where, x, up.a, o.up_rows, a.scale, gather=True)
    launch.up_rows(plan, where, x, up.weight, o.hidden, LowRank(o.up_rows, up.b))
    launch.thin_product(plan, where, o.hidden, down.a, o.down_rows, a.scale)
    launch.join_products(
        *(plan.down, where, o.hidden, down.weight, weights, o.y),
        transposed=False,
        live=True,
        low=LowRank(o.down_rows, down.b),
    )
    return o


def _forward_fake(*args) -> Outputs:
    return _outputs(Arguments(*args))


class DownArguments(NamedTuple):
    """Of the first half of the backward; `wanted` tells which of a `Stack` have a gradient."""

    dy: Tensor
    hidden: Tensor
    down_rows: Tensor
    sorted_weights: Tensor
    table: Tensor
    down: Tensor
    down_a: Tensor
    down_b: Tensor
    choices: int
    scale: float
    wanted: list[bool]

    @property
    def stack(self) -> Stack:
        return Stack(self.down, self.down_a, self.down_b)


class DownGradients(NamedTuple):
    """`du` is the gradient of the rows before relu^2; the last three are a `Stack`."""

    du: Tensor
    dweights: Tensor
    ddown: Tensor
    ddown_a: Tensor
    ddown_b: Tensor


def _places(stack: Stack, wanted: list[bool]) -> Stack:
    return Stack(*map(place_for, stack, wanted))


def _down_gradients(a: DownArguments) -> DownGradients:
    dweights = torch.empty(a.dy.shape[0], a.choices, dtype=torch.float32, device=a.dy.device)
    return DownGradients(empty_like(a.hidden), dweights, *_places(a.stack, a.wanted))


def _backward_down(*args) -> DownGradients:
    a = DownArguments(*args)
    g, plan, dy = _down_gradients(a), Plan.of(a.dy.dtype), unit_stride(a.dy)
    where, down = Sorted.of(a.table, a.sorted_weights, a.down.shape[0]), _contiguous(a.stack)
    rank, wanted = down.a.shape[1], Stack(*a.wanted)
    drows = torch.empty_like(a.down_rows)
    options = {"transposed": True, "gather": True}
    launch.thin_product(plan, where, dy, down.b, drows, a.scale, **options)
    low = LowRank(drows, down.a)
    launch.down_backward_rows(plan, where, dy, a.hidden, down.weight, g.dweights, g.du, low)
    if wanted.weight:
        launch.weights_product(plan.weights, where, dy, a.hidden, g.ddown, gather_a=True, live=True)
    if wanted.a:
        tiles = plan.thin_weights(rank, tall=False)
        launch.weights_product(tiles, where, drows, a.hidden, g.ddown_a, live=True)
    if wanted.b:
        tiles = plan.thin_weights(rank, tall=True)
        launch.weights_product(tiles, where, dy, a.down_rows, g.ddown_b, gather_a=True, live=True)
    return g


def _backward_down_fake(*args) -> DownGradients:
    return _down_gradients(DownArguments(*args))


class UpArguments(NamedTuple):
    """Of the second half; the last two tell which of x and a `Stack` have a gradient."""

    du: Tensor
    x: Tensor
    up_rows: Tensor
    weights: Tensor
    sorted_weights: Tensor
    table: Tensor
    up: Tensor
    up_a: Tensor
    up_b: Tensor
    scale: float
    x_wanted: bool
    wanted: list[bool]

    @property
    def stack(self) -> Stack:
        return Stack(self.up, self.up_a, self.up_b)


class UpGradients(NamedTuple):
    """The last three are a `Stack`."""

    dx: Tensor
    dup: Tensor
    dup_a: Tensor
    dup_b: Tensor


def _up_gradients(a: UpArguments) -> UpGradients:
    return UpGradients(place_for(a.x, a.x_wanted), *_places(a.stack, a.wanted))


def _backward_up(*args) -> UpGradients:
    a = UpArguments(*args)
    g, plan, x = _up_gradients(a), Plan.of(a.x.dtype), unit_stride(a.x)
    where, up = Sorted.of(a.table, a.sorted_weights, a.up.shape[0]), _contiguous(a.stack)
    rank, wanted, drows = up.a.shape[1], Stack(*a.wanted), torch.empty_like(a.up_rows)
    if wanted.weight:
        launch.weights_product(plan.weights, where, a.du, x, g.dup, gather_b=True)
    if wanted.b:
        launch.weights_product(plan.thin_weights(rank, tall=True), where, a.du, a.up_rows, g.dup_b)
    if a.x_wanted or wanted.a:
        launch.thin_product(plan, where, a.du, up.b, drows, a.scale, transposed=True)
    if wanted.a:
        tiles = plan.thin_weights(rank, tall=False)
        launch.weights_product(tiles, where, drows, x, g.dup_a, gather_b=True)
    if a.x_wanted:
        launch.join_products(
            *(plan.up_backward, where, a.du, up.weight, a.weights.contiguous(), g.dx),
            transposed=True,
            live=False,
            low=LowRank(drows, up.a),
        )
    return g


def _backward_up_fake(*args) -> UpGradients:
    return _up_gradients(UpArguments(*args))


def _setup_context(ctx, inputs, output) -> None:
    a = Arguments(*inputs)
    _, *kept = output
    ctx.choices, ctx.scale = a.indices.shape[1], a.scale
    ctx.save_for_backward(a.x, a.weights, *a.up_stack, *a.down_stack, *kept)
    ctx.mark_non_differentiable(*kept)
    ctx.set_materialize_grads(False)


def _autograd(ctx, dy, *_) -> Arguments:
    if dy is None:
        return gradients_of(Arguments)
    x, weights, *saved = ctx.saved_tensors
    up, down = Stack(*saved[:3]), Stack(*saved[3:6])
    hidden, up_rows, down_rows, sorted_weights, table = saved[6:]
    del saved
    if not torch.compiler.is_compiling():
        # What the first half alone needs goes before the buffers of the second half come.
        ctx.maybe_clear_saved_tensors()
    wanted = Arguments(*ctx.needs_input_grad)
    of_up, of_down = wanted.up_stack, wanted.down_stack
    du, dweights, *gradients = _backward_down_op(
        *(dy, hidden, down_rows, sorted_weights, table, *down, ctx.choices, ctx.scale),
        list(of_down),
    )
    ddown = Stack(*gradients)
    del hidden, down_rows, dy
    dx, dup = None, Stack(None, None, None)
    if wanted.x or any(of_up):
        dx, *gradients = _backward_up_op(
            *(du, x, up_rows, weights, sorted_weights, table, *up, ctx.scale, wanted.x),
            list(of_up),
        )
        dup = Stack(*gradients)
    gradients = Arguments(
        *(dx, None, dweights, dup.weight, ddown.weight, dup.a, dup.b, ddown.a, ddown.b, None)
    )
    return Arguments(*[g if w else None for g, w in zip(gradients, wanted, strict=True)])


_backward_down_op = register(
    schema("grouped_low_rank_backward_down", DownArguments, results=5),
    _backward_down,
    _backward_down_fake,
)
_backward_up_op = register(
    schema("grouped_low_rank_backward_up", UpArguments, results=4),
    _backward_up,
    _backward_up_fake,
)
_forward_op = register(
    schema("grouped_low_rank", Arguments, results=6),
    _forward,
    _forward_fake,
    setup_context=_setup_context,
    backward=_autograd,
)


def grouped_low_rank(
    x: Tensor,
    indices: Tensor,
    weights: Tensor,
    up_proj: Tensor,
    down_proj: Tensor,
    up_a: Tensor,
    up_b: Tensor,
    down_a: Tensor,
    down_b: Tensor,
    *,
    scale: float = 1.0,
) -> Tensor:
    matrices = (up_proj, down_proj, up_a, up_b, down_a, down_b)
    return _forward_op(x, indices, weights.float(), *matrices, float(scale))[0]
