"""Which experts a token goes to, and how much each counts (README.md).

T packed tokens, D hidden width, E experts, K experts a token.
"""

import math

import torch
from torch import Tensor


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
    dtype: torch.dtype = torch.float64,
) -> tuple[Tensor, Tensor]:
    """The K experts of highest `sigmoid(x weight^T) + bias`, weighted by their sigmoids.

    With groups of experts, the `topk_group` groups of highest score (the sum of a group's two
    largest) are kept and every other expert is out of the question, whatever the sign of the
    scores. Ties go to the lower index.

    Args:
        x: `[T, D]`.
        weight: `[E, D]`.
        bias: `[E]`, the score correction: it takes part in the choice alone, and has no gradient.
        top_k: K.
        n_group, topk_group: groups, contiguous in the experts, and how many are kept.
        norm_topk_prob: whether a token's weights are divided by their sum.
        scaling_factor: of the weights, last.
        dtype: what everything is computed and returned in; float64 is the truth.

    Returns:
        weights `[T, K]` in `dtype` and indices `[T, K]` int64, the best first.
    """
    x, weight, bias = x.to(dtype), weight.to(dtype), bias.to(dtype)
    scores = torch.sigmoid(x @ weight.T)  # [T, E]
    choice = scores.detach() + bias.detach()
    if n_group > 1:
        groups = choice.unflatten(1, (n_group, -1))
        group_scores = _descending(groups).values[..., :2].sum(dim=-1)  # [T, n_group]
        kept = _descending(group_scores).indices[:, :topk_group]
        excluded = torch.ones_like(group_scores, dtype=torch.bool).scatter(1, kept, False)
        choice = groups.masked_fill(excluded[..., None], -math.inf).flatten(1)
    indices = _descending(choice).indices[:, :top_k]
    weights = scores.gather(1, indices)
    if norm_topk_prob:
        weights = weights / (weights.sum(dim=1, keepdim=True) + 1e-20)
    return weights * scaling_factor, indices


def _descending(x: Tensor) -> torch.return_types.sort:
    return torch.sort(x, dim=-1, descending=True, stable=True)
