"""The experts as an op of `torch.library`, with its autograd formula.

Letters: T tokens, K choices a token, R = T*K routed rows, E experts, X width, F expert width.
"""

import torch
from torch import Tensor

from nemotron_v3.ops.common.host import register, unit_stride
from nemotron_v3.ops.experts.kernels import launch
from nemotron_v3.ops.experts.kernels.tables import Plan


def _forward(x, indices, weights, up, down):
    plan = Plan.of(x.dtype)
    y = torch.empty(x.shape, dtype=x.dtype, device=x.device)
    hidden, where = launch.forward(
        plan,
        unit_stride(x),
        indices.contiguous(),
        weights.contiguous(),
        up.contiguous(),
        down.contiguous(),
        y,
    )
    return y, hidden, where.weights, where.table


def _forward_fake(x, indices, weights, up, down):
    E, F, _ = up.shape
    R = indices.shape[0] * indices.shape[1]
    tile = Plan.of(x.dtype).tile

    def empty(*shape, dtype):
        return torch.empty(shape, dtype=dtype, device=x.device)

    return (
        torch.empty(x.shape, dtype=x.dtype, device=x.device),
        empty(R, F, dtype=x.dtype),
        empty(R, dtype=torch.float32),
        empty(launch.table_length(R, E, tile), dtype=torch.int32),
    )


def _backward_down(dy, hidden, sorted_weights, table, down, K, wanted):
    E = down.shape[0]
    plan = Plan.of(dy.dtype)
    dweights = torch.empty(dy.shape[0], K, dtype=torch.float32, device=dy.device)
    ddown = torch.empty(down.shape if wanted else (0,), dtype=down.dtype, device=dy.device)
    du = launch.backward_down(
        plan,
        launch.Sorted.of(table, sorted_weights, E),
        unit_stride(dy),
        hidden,
        down.contiguous(),
        dweights,
        ddown if wanted else None,
    )
    return du, dweights, ddown


def _backward_down_fake(dy, hidden, sorted_weights, table, down, K, wanted):
    return (
        torch.empty(hidden.shape, dtype=hidden.dtype, device=dy.device),
        torch.empty((dy.shape[0], K), dtype=torch.float32, device=dy.device),
        torch.empty(down.shape if wanted else (0,), dtype=down.dtype, device=dy.device),
    )


def _backward_up(du, x, weights, sorted_weights, table, up, x_wanted, up_wanted):
    E = up.shape[0]
    dx = torch.empty(x.shape if x_wanted else (0,), dtype=x.dtype, device=x.device)
    dup = torch.empty(up.shape if up_wanted else (0,), dtype=up.dtype, device=x.device)
    launch.backward_up(
        Plan.of(x.dtype),
        launch.Sorted.of(table, sorted_weights, E),
        du,
        unit_stride(x),
        up.contiguous(),
        weights.contiguous(),
        dx if x_wanted else None,
        dup if up_wanted else None,
    )
    return dx, dup


def _backward_up_fake(du, x, weights, sorted_weights, table, up, x_wanted, up_wanted):
    dx = torch.empty(x.shape if x_wanted else (0,), dtype=x.dtype, device=x.device)
    return dx, torch.empty(up.shape if up_wanted else (0,), dtype=up.dtype, device=x.device)


def _setup_context(ctx, inputs, output) -> None:
    x, indices, weights, up, down = inputs
    _, hidden, sorted_weights, table = output
    ctx.choices = indices.shape[1]
    ctx.save_for_backward(x, weights, up, down, hidden, sorted_weights, table)
    ctx.mark_non_differentiable(hidden, sorted_weights, table)
    ctx.set_materialize_grads(False)


def _autograd(ctx, dy, *_):
    if dy is None:
        return (None,) * 5
    x, weights, up, down, hidden, sorted_weights, table = ctx.saved_tensors
    if not torch.compiler.is_compiling():
        # What the first half alone needs goes before the buffers of the second half come.
        ctx.maybe_clear_saved_tensors()
    x_wanted, _, weights_wanted, up_wanted, down_wanted = ctx.needs_input_grad
    du, dweights, ddown = _backward_down_op(
        dy, hidden, sorted_weights, table, down, ctx.choices, down_wanted
    )
    del hidden, dy
    dx, dup = None, None
    if x_wanted or up_wanted:
        dx, dup = _backward_up_op(du, x, weights, sorted_weights, table, up, x_wanted, up_wanted)
    return (
        dx if x_wanted else None,
        None,
        dweights if weights_wanted else None,
        dup if up_wanted else None,
        ddown if down_wanted else None,
    )


_backward_down_op = register(
    "experts_backward_down(Tensor dy, Tensor hidden, Tensor sorted_weights, Tensor table, "
    "Tensor down, SymInt choices, bool wanted) -> (Tensor, Tensor, Tensor)",
    _backward_down,
    _backward_down_fake,
)
_backward_up_op = register(
    "experts_backward_up(Tensor du, Tensor x, Tensor weights, Tensor sorted_weights, Tensor table, "
    "Tensor up, bool x_wanted, bool up_wanted) -> (Tensor, Tensor)",
    _backward_up,
    _backward_up_fake,
)
_forward_op = register(
    "experts(Tensor x, Tensor indices, Tensor weights, Tensor up, Tensor down) -> "
    "(Tensor, Tensor, Tensor, Tensor)",
    _forward,
    _forward_fake,
    setup_context=_setup_context,
    backward=_autograd,
)


def experts(
    x: Tensor, indices: Tensor, weights: Tensor, up_proj: Tensor, down_proj: Tensor
) -> Tensor:
    return _forward_op(x, indices, weights.float(), up_proj, down_proj)[0]
