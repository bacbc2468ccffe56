"""The experts as an op of `torch.library`, with its autograd formula.

Letters: T tokens, K choices a token, R = T*K routed rows, E experts, X width, F expert width.
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
from nemotron_v3.ops.experts.kernels.tables import Plan


class Arguments(NamedTuple):
    """Of the forward op."""

    x: Tensor
    indices: Tensor
    weights: Tensor
    up: Tensor
    down: Tensor


class Outputs(NamedTuple):
    """The last three are kept: `weights[r] relu(u)^2` of the sorted rows, and where they lie."""

    y: Tensor
    hidden: Tensor
    sorted_weights: Tensor
    table: Tensor


def _place_alike(stack: Tensor, wanted: bool) -> Tensor:
    """Where the gradient of a stack is written to, which lies as the stack does: otherwise whoever
    holds the parameter would copy it."""
    if not wanted or stack.is_contiguous() or not stack.mT.is_contiguous():
        return place_for(stack, wanted)
    return place_for(stack.mT, wanted).mT


def _outputs(a: Arguments) -> Outputs:
    E, F, _ = a.up.shape
    R = a.indices.shape[0] * a.indices.shape[1]
    where = launch.sorted_rows(a.x, R, E, Plan.of(a.x.dtype).tile)
    hidden = torch.empty((R, F), dtype=a.x.dtype, device=a.x.device)
    return Outputs(empty_like(a.x), hidden, where.weights, where.table)


def _forward(*args) -> Outputs:
    a = Arguments(*args)
    o, plan = _outputs(a), Plan.of(a.x.dtype)
    up, down = launch.as_it_lies(a.up), launch.as_it_lies(a.down)
    weights = a.weights.contiguous()
    where = launch.Sorted.of(o.table, o.sorted_weights, up.shape[0])
    launch.sort_rows(a.indices.contiguous(), weights, plan.tile, where)
    launch.up_rows(plan, where, unit_stride(a.x), up, o.hidden)
    launch.join_products(
        plan.down, where, o.hidden, down, weights, o.y, transposed=False, live=True
    )
    return o


def _forward_fake(*args) -> Outputs:
    return _outputs(Arguments(*args))


class DownArguments(NamedTuple):
    """Of the first half of the backward; `wanted` tells whether `down` has a gradient."""

    dy: Tensor
    hidden: Tensor
    sorted_weights: Tensor
    table: Tensor
    down: Tensor
    choices: int
    wanted: bool


class DownGradients(NamedTuple):
    """`du` is the gradient of the rows before relu^2, `[R, F]`."""

    du: Tensor
    dweights: Tensor
    ddown: Tensor


def _down_gradients(a: DownArguments) -> DownGradients:
    dweights = torch.empty(a.dy.shape[0], a.choices, dtype=torch.float32, device=a.dy.device)
    return DownGradients(empty_like(a.hidden), dweights, _place_alike(a.down, a.wanted))


def _backward_down(*args) -> DownGradients:
    a = DownArguments(*args)
    g, plan, dy = _down_gradients(a), Plan.of(a.dy.dtype), unit_stride(a.dy)
    where = launch.Sorted.of(a.table, a.sorted_weights, a.down.shape[0])
    down = launch.as_it_lies(a.down)
    launch.down_backward_rows(plan, where, dy, a.hidden, down, g.dweights, g.du)
    if a.wanted:
        launch.weights_product(plan.weights, where, dy, a.hidden, g.ddown, gather_a=True, live=True)
    return g


def _backward_down_fake(*args) -> DownGradients:
    return _down_gradients(DownArguments(*args))


class UpArguments(NamedTuple):
    """Of the second half; the last two tell which of x and `up` have a gradient."""

    du: Tensor
    x: Tensor
    weights: Tensor
    sorted_weights: Tensor
    table: Tensor
    up: Tensor
    x_wanted: bool
    up_wanted: bool


class UpGradients(NamedTuple):
    dx: Tensor
    dup: Tensor


def _up_gradients(a: UpArguments) -> UpGradients:
    return UpGradients(place_for(a.x, a.x_wanted), _place_alike(a.up, a.up_wanted))


def _backward_up(*args) -> UpGradients:
    a = UpArguments(*args)
    g, plan = _up_gradients(a), Plan.of(a.x.dtype)
    where = launch.Sorted.of(a.table, a.sorted_weights, a.up.shape[0])
    if a.up_wanted:
        x = unit_stride(a.x)
        launch.weights_product(plan.weights, where, a.du, x, g.dup, gather_b=True)
    if a.x_wanted:
        launch.join_products(
            *(plan.up_backward, where, a.du, launch.as_it_lies(a.up)),
            *(a.weights.contiguous(), g.dx),
            transposed=True,
            live=False,
        )
    return g


def _backward_up_fake(*args) -> UpGradients:
    return _up_gradients(UpArguments(*args))


def _setup_context(ctx, inputs, output) -> None:
    a = Arguments(*inputs)
    _, *kept = output
    ctx.choices = a.indices.shape[1]
    ctx.save_for_backward(a.x, a.weights, a.up, a.down, *kept)
    ctx.mark_non_differentiable(*kept)
    ctx.set_materialize_grads(False)


def _autograd(ctx, dy, *_) -> Arguments:
    if dy is None:
        return gradients_of(Arguments)
    x, weights, up, down, hidden, sorted_weights, table = ctx.saved_tensors
    if not torch.compiler.is_compiling():
        # What the first half alone needs goes before the buffers of the second half come.
        ctx.maybe_clear_saved_tensors()
    wanted = Arguments(*ctx.needs_input_grad)
    du, dweights, ddown = _backward_down_op(
        dy, hidden, sorted_weights, table, down, ctx.choices, wanted.down
    )
    del hidden, dy
    dx, dup = None, None
    if wanted.x or wanted.up:
        dx, dup = _backward_up_op(du, x, weights, sorted_weights, table, up, wanted.x, wanted.up)
    return gradients_of(
        Arguments,
        x=dx if wanted.x else None,
        weights=dweights if wanted.weights else None,
        up=dup if wanted.up else None,
        down=ddown if wanted.down else None,
    )


_backward_down_op = register(
    schema("experts_backward_down", DownArguments, results=3), _backward_down, _backward_down_fake
)
_backward_up_op = register(
    schema("experts_backward_up", UpArguments, results=2), _backward_up, _backward_up_fake
)
_forward_op = register(
    schema("experts", Arguments, results=4),
    _forward,
    _forward_fake,
    setup_context=_setup_context,
    backward=_autograd,
)


def experts(
    x: Tensor, indices: Tensor, weights: Tensor, up_proj: Tensor, down_proj: Tensor
) -> Tensor:
    return _forward_op(x, indices, weights.float(), up_proj, down_proj)[0]
