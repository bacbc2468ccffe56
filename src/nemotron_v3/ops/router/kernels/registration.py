"""The router as an op of `torch.library`, with its autograd formula.

Letters: T tokens, D width, E experts, K choices.
"""

from typing import NamedTuple

import torch
import torch.nn.functional as F
import triton
from torch import Tensor

from nemotron_v3.ops.common.host import (
    gradients_of,
    interpreted,
    place_for,
    power_of_two,
    register,
    schema,
    unit_stride,
)
from nemotron_v3.ops.router.kernels import choose


class Arguments(NamedTuple):
    """Of the forward op."""

    x: Tensor
    weight: Tensor
    bias: Tensor
    top_k: int
    groups: int
    kept: int
    normalise: bool
    factor: float

    @property
    def sizes(self) -> choose.Sizes:
        E = self.weight.shape[0]
        # 16 elements a thread.
        block_t = 32 if interpreted() else max(1, 2048 // power_of_two(E))
        blocks = (block_t, *map(power_of_two, (E, self.top_k, self.groups)))
        return choose.Sizes(E, self.top_k, self.groups, self.kept, self.normalise, *blocks)


class Outputs(NamedTuple):
    """`scores` `[T, K]` of the chosen are for the backward."""

    weights: Tensor
    indices: Tensor
    scores: Tensor


def _outputs(a: Arguments) -> Outputs:
    def empty(dtype: torch.dtype) -> Tensor:
        return torch.empty((a.x.shape[0], a.top_k), dtype=dtype, device=a.x.device)

    return Outputs(empty(torch.float32), empty(torch.int64), empty(torch.float32))


def _logits(x: Tensor, weight: Tensor) -> Tensor:
    """`[T, E]` fp32."""
    narrow = x.dtype == weight.dtype and x.dtype in (torch.bfloat16, torch.float16)
    if not narrow:
        return F.linear(x.float(), weight.float())
    x, weight = unit_stride(x), weight.contiguous()
    (T, D), E = x.shape, weight.shape[0]
    logits = torch.empty(T, E, dtype=torch.float32, device=x.device)
    block_t, block_e, block_d = 64, min(128, max(16, power_of_two(E))), 64
    choose.logits_kernel[(triton.cdiv(T, block_t) * triton.cdiv(E, block_e),)](
        *(x, weight, logits, T, D, E, x.stride(0), block_t, block_e, block_d),
        STAGES=3,
        num_warps=4,
    )
    return logits


def _forward(*args) -> Outputs:
    a = Arguments(*args)
    outputs, sizes, T = _outputs(a), a.sizes, a.x.shape[0]
    choose.choose_kernel[(triton.cdiv(T, sizes.BLOCK_T),)](
        *(_logits(a.x, a.weight), a.bias.contiguous(), *outputs, T, a.factor, sizes),
        num_warps=4,
    )
    return outputs


def _forward_fake(*args) -> Outputs:
    return _outputs(Arguments(*args))


class Upstream(NamedTuple):
    """What the backward op is given before `Arguments`; the last two tell what is wanted."""

    dweights: Tensor
    indices: Tensor
    scores: Tensor
    x_wanted: bool
    weight_wanted: bool


class Gradients(NamedTuple):
    dx: Tensor
    dweight: Tensor


def _backward(*args) -> Gradients:
    upstream, a = Upstream(*args[:5]), Arguments(*args[5:])
    x, weight, sizes = a.x, a.weight, a.sizes
    T, E = x.shape[0], sizes.E
    # The gradient of a logit in two bf16 numbers has 16 bits, more than its products keep.
    split = x.is_cuda and x.dtype == weight.dtype == torch.bfloat16
    dtype = x.dtype if split else torch.float32
    dlogits = torch.empty(T, 2 * E if split else E, dtype=dtype, device=x.device)
    choose.choose_backward_kernel[(triton.cdiv(T, sizes.BLOCK_T),)](
        *(upstream.dweights.contiguous(), upstream.scores, upstream.indices, dlogits),
        *(T, a.factor, sizes, split),
        num_warps=4,
    )
    dx, dweight = place_for(x, False), place_for(weight, False)
    if upstream.x_wanted:
        both = torch.cat([weight, weight]) if split else weight.float()
        dx = (dlogits @ both).to(x.dtype)
    if upstream.weight_wanted and split:
        high, low = torch.mm(dlogits.t(), x, out_dtype=torch.float32).split(E)
        dweight = (high + low).to(weight.dtype)
    elif upstream.weight_wanted:
        dweight = (dlogits.t() @ x.float()).to(weight.dtype)
    return Gradients(dx, dweight)


def _backward_fake(*args) -> Gradients:
    upstream, a = Upstream(*args[:5]), Arguments(*args[5:])
    dx = place_for(a.x, upstream.x_wanted)
    return Gradients(dx, place_for(a.weight, upstream.weight_wanted))


def _setup_context(ctx, inputs, output) -> None:
    x, weight, bias, *ctx.options = inputs
    _, indices, scores = output
    ctx.save_for_backward(indices, scores, x, weight, bias)
    ctx.mark_non_differentiable(indices, scores)
    ctx.set_materialize_grads(False)


def _autograd(ctx, dweights, *_) -> Arguments:
    if dweights is None:
        return gradients_of(Arguments)
    indices, scores, *tensors = ctx.saved_tensors
    wanted = ctx.needs_input_grad[:2]
    dx, dweight = _backward_op(dweights, indices, scores, *wanted, *tensors, *ctx.options)
    return gradients_of(
        Arguments, x=dx if wanted[0] else None, weight=dweight if wanted[1] else None
    )


_backward_op = register(
    schema("router_backward", Upstream, Arguments, results=2), _backward, _backward_fake
)
_forward_op = register(
    schema("router", Arguments, results=3),
    _forward,
    _forward_fake,
    setup_context=_setup_context,
    backward=_autograd,
)


def router(
    x: Tensor,
    weight: Tensor,
    bias: Tensor,
    *,
    top_k: int,
    n_group: int = 1,
    topk_group: int = 1,
    norm_topk_prob: bool = True,
    scaling_factor: float = 1.0,
) -> tuple[Tensor, Tensor]:
    weights, indices, _ = _forward_op(
        x, weight, bias.float(), top_k, n_group, topk_group, norm_topk_prob, float(scaling_factor)
    )
    return weights, indices
