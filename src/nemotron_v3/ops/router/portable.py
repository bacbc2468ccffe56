"""Sigmoid top-k routing in plain PyTorch.

Letters: T packed tokens, D width, E experts, K choices.
"""

import torch
import torch.nn.functional as F
from torch import Tensor

from nemotron_v3.ops.common.precision import WIDE


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
    dtype = WIDE[x.dtype]
    scores = F.linear(x.to(dtype), weight.to(dtype)).sigmoid()
    return choose(
        scores,
        bias.to(dtype),
        top_k=top_k,
        n_group=n_group,
        topk_group=topk_group,
        norm_topk_prob=norm_topk_prob,
        scaling_factor=scaling_factor,
    )


def choose(
    scores: Tensor,
    bias: Tensor,
    *,
    top_k: int,
    n_group: int,
    topk_group: int,
    norm_topk_prob: bool,
    scaling_factor: float,
) -> tuple[Tensor, Tensor]:
    """The router from its scores `[T, E]` on."""
    choice = scores.detach() + bias
    if n_group > 1:
        choice = _keep_best_groups(choice, n_group, topk_group)
    indices = choice.topk(top_k, dim=-1).indices  # [T, K]
    weights = scores.gather(1, indices)
    if norm_topk_prob:
        weights = weights / (weights.sum(-1, keepdim=True) + 1e-20)
    return weights * scaling_factor, indices


def _keep_best_groups(choice: Tensor, n_group: int, topk_group: int) -> Tensor:
    """Excluded groups score -inf: a 0 would beat a negative biased score."""
    groups = choice.unflatten(1, (n_group, -1))
    best = groups.topk(min(2, groups.shape[-1]), dim=-1).values.sum(-1)  # [T, n_group]
    kept = torch.zeros_like(best, dtype=torch.bool)
    kept.scatter_(1, best.topk(topk_group, dim=-1).indices, True)
    return groups.masked_fill(~kept[..., None], float("-inf")).flatten(1)
