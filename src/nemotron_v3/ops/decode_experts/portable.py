"""A decode step's experts in plain PyTorch: the same buffers, without the sorted choices."""

import torch
import torch.nn.functional as F
from torch import Tensor

from nemotron_v3.ops.common.low_rank import LowRank, with_update
from nemotron_v3.ops.common.precision import WIDE
from nemotron_v3.ops.decode_experts.buffers import Buffers
from nemotron_v3.ops.decode_experts.weights import Router, Updates
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
    updates: Updates | None = None,
    out: Tensor,
) -> Tensor:
    updates = updates or Updates()
    sum_ = torch.zeros_like(out, dtype=buffers.y.dtype)
    if routed is not None:
        up, down = routed
        chosen = buffers.experts.clamp(min=0).long()  # [R, K]
        u = _by_choice(x[:, None].expand(-1, chosen.shape[1], -1), up, chosen, updates.up)
        h = (_squared(u) * buffers.weights[..., None]).to(u.dtype)
        sum_ += _by_choice(h, down, chosen, updates.down).to(sum_.dtype).sum(1)
    if shared is not None:
        normed = buffers.normed
        u = with_update(normed, F.linear(normed, shared[0]), updates.shared_up)
        h = _squared(u).to(u.dtype)
        sum_ += with_update(h, F.linear(h, shared[1]), updates.shared_down)
    if residual is not None:
        sum_ += residual
    return out.copy_(torch.where(active[:, None] != 0, sum_.to(out.dtype), out))


def _by_choice(x: Tensor, stack: Tensor, chosen: Tensor, update: LowRank | None) -> Tensor:
    """`[R, K, n]` times the matrix `[E, m, n]` that each choice `[R, K]` names: `[R, K, m]`."""
    y = torch.einsum("rkmn,rkn->rkm", stack[chosen], x)
    if update is None:
        return y
    thin = torch.einsum("rkmn,rkn->rkm", update.a[chosen], x.to(update.a.dtype))
    return (y + update.scale * torch.einsum("rkmn,rkn->rkm", update.b[chosen], thin)).to(y.dtype)


def _squared(u: Tensor) -> Tensor:
    """`relu(u)^2`, which is rounded once its weight is in it."""
    return F.relu(u).to(WIDE[u.dtype]).square()
