"""Experts with low-rank updates in Triton, as an op of `torch.library` (README.md).

The kernels are those of the experts. A product with `W + α B A` is the product with W, to whose
accumulator the rows' thin products, `α A` times each, are added times B.

Letters: T tokens, K choices a token, R = T*K routed rows, E experts, X width, F expert width; r and
s ranks of the updates of up and down.
"""

import torch
from torch import Tensor

from nemotron_v3.ops.common.host import register, unit_stride
from nemotron_v3.ops.experts.kernels import launch
from nemotron_v3.ops.experts.kernels.launch import LowRank, Sorted
from nemotron_v3.ops.experts.kernels.tables import Plan

MATRICES = "Tensor up, Tensor down, Tensor up_a, Tensor up_b, Tensor down_a, Tensor down_b"


def _empty(like: Tensor, *shape: int, dtype: torch.dtype | None = None) -> Tensor:
    return torch.empty(shape, dtype=dtype or like.dtype, device=like.device)


def _wanted(like: Tensor, shape: tuple[int, ...], wanted: bool) -> Tensor:
    """What a gradient is written to; nothing where it is not wanted."""
    return _empty(like, *(shape if wanted else (0,)))


def _forward(x, indices, weights, up, down, up_a, up_b, down_a, down_b, scale):
    plan, x, weights = Plan.of(x.dtype), unit_stride(x), weights.contiguous()
    up, down, up_a, up_b, down_a, down_b = (
        m.contiguous() for m in (up, down, up_a, up_b, down_a, down_b)
    )
    y = _empty(x, *x.shape)
    where = launch.sort_rows(indices.contiguous(), weights, up.shape[0], plan.tile)
    up_rows = launch.thin_product(plan, where, x, up_a, scale, gather=True)
    hidden = launch.up_rows(plan, where, x, up, LowRank(up_rows, up_b))
    down_rows = launch.thin_product(plan, where, hidden, down_a, scale)
    launch.join_products(
        plan.down,
        where,
        hidden,
        down,
        weights,
        y,
        transposed=False,
        live=True,
        low=LowRank(down_rows, down_b),
    )
    return y, hidden, up_rows, down_rows, where.weights, where.table


def _forward_fake(x, indices, weights, up, down, up_a, up_b, down_a, down_b, scale):
    R = indices.shape[0] * indices.shape[1]
    length = launch.table_length(R, up.shape[0], Plan.of(x.dtype).tile)
    return (
        _empty(x, *x.shape),
        *(_empty(x, R, width) for width in (up.shape[1], up_a.shape[1], down_a.shape[1])),
        _empty(x, R, dtype=torch.float32),
        _empty(x, length, dtype=torch.int32),
    )


def _backward_down(
    dy, hidden, down_rows, sorted_weights, table, down, down_a, down_b, K, scale, wanted
):
    plan, dy = Plan.of(dy.dtype), unit_stride(dy)
    where = Sorted.of(table, sorted_weights, down.shape[0])
    down, down_a, down_b = (m.contiguous() for m in (down, down_a, down_b))
    dweights = _empty(dy, dy.shape[0], K, dtype=torch.float32)
    drows = launch.thin_product(plan, where, dy, down_b, scale, transposed=True, gather=True)
    low = LowRank(drows, down_a)
    du = launch.down_backward_rows(plan, where, dy, hidden, down, dweights, low)
    ddown, ddown_a, ddown_b = (
        _wanted(m, m.shape, want) for m, want in zip((down, down_a, down_b), wanted, strict=True)
    )
    rank = down_a.shape[1]
    if wanted[0]:
        launch.weights_product(plan.weights, where, dy, hidden, ddown, gather_a=True, live=True)
    if wanted[1]:
        tiles = plan.thin_weights(rank, tall=False)
        launch.weights_product(tiles, where, drows, hidden, ddown_a, live=True)
    if wanted[2]:
        tiles = plan.thin_weights(rank, tall=True)
        launch.weights_product(tiles, where, dy, down_rows, ddown_b, gather_a=True, live=True)
    return du, dweights, ddown, ddown_a, ddown_b


def _backward_down_fake(
    dy, hidden, down_rows, sorted_weights, table, down, down_a, down_b, K, scale, wanted
):
    return (
        _empty(hidden, *hidden.shape),
        _empty(dy, dy.shape[0], K, dtype=torch.float32),
        *(_wanted(m, m.shape, w) for m, w in zip((down, down_a, down_b), wanted, strict=True)),
    )


def _backward_up(
    du, x, up_rows, weights, sorted_weights, table, up, up_a, up_b, scale, x_wanted, wanted
):
    plan, x = Plan.of(x.dtype), unit_stride(x)
    where = Sorted.of(table, sorted_weights, up.shape[0])
    up, up_a, up_b = (m.contiguous() for m in (up, up_a, up_b))
    dx = _wanted(x, x.shape, x_wanted)
    dup, dup_a, dup_b = (
        _wanted(m, m.shape, want) for m, want in zip((up, up_a, up_b), wanted, strict=True)
    )
    rank = up_a.shape[1]
    if wanted[0]:
        launch.weights_product(plan.weights, where, du, x, dup, gather_b=True)
    if wanted[2]:
        tiles = plan.thin_weights(rank, tall=True)
        launch.weights_product(tiles, where, du, up_rows, dup_b)
    if x_wanted or wanted[1]:
        drows = launch.thin_product(plan, where, du, up_b, scale, transposed=True)
    if wanted[1]:
        tiles = plan.thin_weights(rank, tall=False)
        launch.weights_product(tiles, where, drows, x, dup_a, gather_b=True)
    if x_wanted:
        launch.join_products(
            plan.up_backward,
            where,
            du,
            up,
            weights.contiguous(),
            dx,
            transposed=True,
            live=False,
            low=LowRank(drows, up_a),
        )
    return dx, dup, dup_a, dup_b


def _backward_up_fake(
    du, x, up_rows, weights, sorted_weights, table, up, up_a, up_b, scale, x_wanted, wanted
):
    return (
        _wanted(x, x.shape, x_wanted),
        *(_wanted(m, m.shape, w) for m, w in zip((up, up_a, up_b), wanted, strict=True)),
    )


def _setup_context(ctx, inputs, output) -> None:
    x, indices, weights, up, down, up_a, up_b, down_a, down_b, ctx.scale = inputs
    _, *kept = output
    ctx.choices = indices.shape[1]
    ctx.save_for_backward(x, weights, up, down, up_a, up_b, down_a, down_b, *kept)
    ctx.mark_non_differentiable(*kept)
    ctx.set_materialize_grads(False)


def _autograd(ctx, dy, *_):
    if dy is None:
        return (None,) * 10
    x, weights, up, down, up_a, up_b, down_a, down_b, *kept = ctx.saved_tensors
    hidden, up_rows, down_rows, sorted_weights, table = kept
    del kept
    if not torch.compiler.is_compiling():
        # What the first half alone needs goes before the buffers of the second half come.
        ctx.maybe_clear_saved_tensors()
    x_wanted, _, weights_wanted, *wanted = ctx.needs_input_grad[:9]
    of_up, of_down = [wanted[i] for i in (0, 2, 3)], [wanted[i] for i in (1, 4, 5)]
    du, dweights, *down_gradients = _backward_down_op(
        dy,
        hidden,
        down_rows,
        sorted_weights,
        table,
        down,
        down_a,
        down_b,
        ctx.choices,
        ctx.scale,
        of_down,
    )
    del hidden, down_rows, dy
    dx, up_gradients = None, [None] * 3
    if x_wanted or any(of_up):
        dx, *up_gradients = _backward_up_op(
            du,
            x,
            up_rows,
            weights,
            sorted_weights,
            table,
            up,
            up_a,
            up_b,
            ctx.scale,
            x_wanted,
            of_up,
        )
    dup, dup_a, dup_b = (g if w else None for g, w in zip(up_gradients, of_up, strict=True))
    ddown, ddown_a, ddown_b = (
        g if w else None for g, w in zip(down_gradients, of_down, strict=True)
    )
    return (
        dx if x_wanted else None,
        None,
        dweights if weights_wanted else None,
        dup,
        ddown,
        dup_a,
        dup_b,
        ddown_a,
        ddown_b,
        None,
    )


_backward_down_op = register(
    "grouped_low_rank_backward_down(Tensor dy, Tensor hidden, Tensor down_rows, "
    "Tensor sorted_weights, Tensor table, Tensor down, Tensor down_a, Tensor down_b, "
    "SymInt choices, float scale, bool[] wanted) -> (Tensor, Tensor, Tensor, Tensor, Tensor)",
    _backward_down,
    _backward_down_fake,
)
_backward_up_op = register(
    "grouped_low_rank_backward_up(Tensor du, Tensor x, Tensor up_rows, Tensor weights, "
    "Tensor sorted_weights, Tensor table, Tensor up, Tensor up_a, Tensor up_b, float scale, "
    "bool x_wanted, bool[] wanted) -> (Tensor, Tensor, Tensor, Tensor)",
    _backward_up,
    _backward_up_fake,
)
_forward_op = register(
    f"grouped_low_rank(Tensor x, Tensor indices, Tensor weights, {MATRICES}, float scale) -> "
    "(Tensor, Tensor, Tensor, Tensor, Tensor, Tensor)",
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
