"""A decode step's experts in plain PyTorch: the same buffers, without the sorted choices."""

import torch
import torch.nn.functional as F
from torch import Tensor

from nemotron_v3.ops.common.precision import wide
from nemotron_v3.ops.decode_experts.buffers import Buffers
from nemotron_v3.ops.decode_experts.weights import Router
from nemotron_v3.ops.router.portable import choose


def route(stream: Tensor, router: Router, active: Tensor, buffers: Buffers) -> None:
    kind = buffers.logits.dtype
    x = stream.to(kind)
    scale = torch.rsqrt(x.square().mean(-1, keepdim=True) + router.eps)
    buffers.normed.copy_(x * scale * router.gain.to(kind))
    torch.mm(buffers.normed.to(kind), router.gate.to(kind).t(), out=buffers.logits)
    scores = buffers.logits.sigmoid()
    weights, indices = choose(
        scores,
        router.bias.to(kind),
        top_k=router.top_k,
        n_group=router.n_group,
        topk_group=router.topk_group,
        norm_topk_prob=router.norm_topk_prob and not router.weights_use_bias,
        scaling_factor=1.0,
    )
    if router.weights_use_bias:
        weights = weights + router.bias.to(kind)[indices]
        if router.norm_topk_prob:
            weights = weights / (weights.sum(-1, keepdim=True) + 1e-20)
    buffers.weights.copy_(weights * router.scaling_factor)
    buffers.experts.copy_(indices.masked_fill(active[:, None] == 0, -1))


def experts(
    x: Tensor,
    routed: tuple[Tensor, Tensor] | None,
    shared: tuple[Tensor, Tensor] | None,
    active: Tensor,
    buffers: Buffers,
    *,
    residual: Tensor | None,
    out: Tensor,
) -> Tensor:
    sum_ = torch.zeros_like(out, dtype=buffers.y.dtype)
    if routed is not None:
        up, down = routed
        chosen = buffers.experts.clamp(min=0).long()  # [R, K]
        u = torch.einsum("rkfx,rx->rkf", up[chosen], x)
        h = _squared(u) * buffers.weights[..., None]
        sum_ += torch.einsum("rkxf,rkf->rkx", down[chosen], h.to(u.dtype)).to(sum_.dtype).sum(1)
    if shared is not None:
        u = F.linear(buffers.normed, shared[0])
        sum_ += F.linear(_squared(u).to(u.dtype), shared[1])
    if residual is not None:
        sum_ += residual
    return out.copy_(torch.where(active[:, None] != 0, sum_.to(out.dtype), out))


def _squared(u: Tensor) -> Tensor:
    """`relu(u)^2`, which is rounded once its weight is in it."""
    return F.relu(u).to(wide(u.dtype)).square()
