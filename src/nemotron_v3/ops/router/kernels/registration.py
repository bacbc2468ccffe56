"""The router as an op of `torch.library`, with its autograd formula.

Letters: T tokens, H width, E experts, K choices.
"""

import torch
import torch.nn.functional as F
import triton
from torch import Tensor

from nemotron_v3.ops.common.host import interpreted, power_of_two, register, unit_stride
from nemotron_v3.ops.router.kernels import choose


def _block_t(E: int) -> int:
    """Tokens of a program: 16 elements a thread."""
    return 32 if interpreted() else max(1, 2048 // power_of_two(E))


def _logits(x: Tensor, weight: Tensor) -> Tensor:
    """`[T, E]` fp32."""
    narrow = x.dtype == weight.dtype and x.dtype in (torch.bfloat16, torch.float16)
    if not narrow:
        return F.linear(x.float(), weight.float())
    x, weight = unit_stride(x), weight.contiguous()
    (T, H), E = x.shape, weight.shape[0]
    logits = torch.empty(T, E, dtype=torch.float32, device=x.device)
    block_t, block_e, block_h = 64, min(128, max(16, power_of_two(E))), 64
    choose.logits_kernel[(triton.cdiv(T, block_t) * triton.cdiv(E, block_e),)](
        x,
        weight,
        logits,
        T,
        H,
        E,
        x.stride(0),
        block_t,
        block_e,
        block_h,
        3,
        num_warps=4,
    )
    return logits


def _forward(x, weight, bias, K, groups, kept, normalise, factor):
    T, E = x.shape[0], weight.shape[0]

    def empty(dtype: torch.dtype) -> Tensor:
        return torch.empty(T, K, dtype=dtype, device=x.device)

    weights, indices, scores = empty(torch.float32), empty(torch.int64), empty(torch.float32)
    block_t = _block_t(E)
    choose.choose_kernel[(triton.cdiv(T, block_t),)](
        _logits(x, weight),
        bias.contiguous(),
        weights,
        indices,
        scores,
        T,
        factor,
        E,
        K,
        groups,
        kept,
        normalise,
        block_t,
        power_of_two(E),
        power_of_two(K),
        power_of_two(groups),
        num_warps=4,
    )
    return weights, indices, scores


def _forward_fake(x, weight, bias, K, groups, kept, normalise, factor):
    def empty(dtype: torch.dtype) -> Tensor:
        return torch.empty((x.shape[0], K), dtype=dtype, device=x.device)

    return empty(torch.float32), empty(torch.int64), empty(torch.float32)


def _backward(dweights, scores, indices, x, weight, normalise, factor, x_wanted, weight_wanted):
    (T, K), E = scores.shape, weight.shape[0]
    # The gradient of a logit in two bf16 numbers has 16 bits, more than its products keep.
    split = x.is_cuda and x.dtype == weight.dtype == torch.bfloat16
    kind = {"dtype": x.dtype if split else torch.float32, "device": x.device}
    dlogits = torch.empty(T, 2 * E if split else E, **kind)
    block_t = _block_t(E)
    choose.choose_backward_kernel[(triton.cdiv(T, block_t),)](
        dweights.contiguous(),
        scores,
        indices,
        dlogits,
        T,
        factor,
        E,
        K,
        normalise,
        split,
        block_t,
        power_of_two(E),
        power_of_two(K),
        num_warps=4,
    )
    dx, dweight = x.new_empty(0), weight.new_empty(0)
    if x_wanted:
        both = torch.cat([weight, weight]) if split else weight.float()
        dx = (dlogits @ both).to(x.dtype)
    if weight_wanted and split:
        high, low = torch.mm(dlogits.t(), x, out_dtype=torch.float32).split(E)
        dweight = (high + low).to(weight.dtype)
    elif weight_wanted:
        dweight = (dlogits.t() @ x.float()).to(weight.dtype)
    return dx, dweight


def _backward_fake(
    dweights, scores, indices, x, weight, normalise, factor, x_wanted, weight_wanted
):
    dx = torch.empty(x.shape if x_wanted else (0,), dtype=x.dtype, device=x.device)
    shape = weight.shape if weight_wanted else (0,)
    return dx, torch.empty(shape, dtype=weight.dtype, device=x.device)


def _setup_context(ctx, inputs, output) -> None:
    x, weight, _, _, _, _, ctx.normalise, ctx.factor = inputs
    _, indices, scores = output
    ctx.save_for_backward(scores, indices, x, weight)
    ctx.mark_non_differentiable(indices, scores)
    ctx.set_materialize_grads(False)


def _autograd(ctx, dweights, *_):
    if dweights is None:
        return (None,) * 8
    x_wanted, weight_wanted = ctx.needs_input_grad[:2]
    dx, dweight = _backward_op(
        dweights, *ctx.saved_tensors, ctx.normalise, ctx.factor, x_wanted, weight_wanted
    )
    return dx if x_wanted else None, dweight if weight_wanted else None, *(None,) * 6


_backward_op = register(
    "router_backward(Tensor dweights, Tensor scores, Tensor indices, Tensor x, Tensor weight, "
    "bool normalise, float factor, bool x_wanted, bool weight_wanted) -> (Tensor, Tensor)",
    _backward,
    _backward_fake,
)
_forward_op = register(
    "router(Tensor x, Tensor weight, Tensor bias, SymInt top_k, SymInt groups, SymInt kept, "
    "bool normalise, float factor) -> (Tensor, Tensor, Tensor)",
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
