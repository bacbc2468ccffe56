"""The loss of a linear head, from all its logits at once (README.md).

T packed tokens, D width of the hidden states, V vocabulary.
"""

import torch
from torch import Tensor


def linear_log_probabilities(
    hidden: Tensor,
    weight: Tensor,
    targets: Tensor,
    *,
    ignore_index: int = -100,
    dtype: torch.dtype = torch.float64,
) -> tuple[Tensor, Tensor]:
    """`logits = hidden weight^T`; `log softmax(logits)[target]` and `log sum exp(logits)` a token.

    Args:
        hidden: `[T, D]`.
        weight: `[V, D]`.
        targets: `[T]` integers; `ignore_index` is no target.
        ignore_index: the value whose tokens give 0 and 0.
        dtype: what everything is computed and returned in; float64 is the truth.

    Returns:
        Two `[T]` in `dtype`, in nats.
    """
    logits = hidden.to(dtype) @ weight.to(dtype).T  # [T, V]
    log_p, log_z = [], []
    for row, target in zip(logits.unbind(0), targets.tolist(), strict=True):
        if target == ignore_index:
            zero = (row * 0).sum()
            log_p.append(zero)
            log_z.append(zero)
            continue
        largest = row.detach().max()
        log_sum = torch.log(torch.exp(row - largest).sum())  # the largest exponential is 1
        log_p.append(row[target] - largest - log_sum)
        log_z.append(largest + log_sum)
    if not log_p:
        return logits.sum(1), logits.sum(1)
    return torch.stack(log_p), torch.stack(log_z)


def linear_cross_entropy(
    hidden: Tensor,
    weight: Tensor,
    targets: Tensor,
    *,
    ignore_index: int = -100,
    z_loss: float = 0.0,
    per_token: bool = False,
    dtype: torch.dtype = torch.float64,
) -> Tensor | tuple[Tensor, Tensor, Tensor]:
    """`sum_t (-log_p[t] + z_loss log_z[t]^2) / n` over the n tokens that have a target.

    Args:
        z_loss: the weight of the square of the log-normaliser.
        per_token: whether `log_p` and `log_z` come back too, without gradients.
        hidden, weight, targets, ignore_index, dtype: see `linear_log_probabilities`.

    Returns:
        A scalar in `dtype`; 0, with gradients of zeros, where there is no target. With `per_token`
        also two `[T]`.
    """
    log_p, log_z = linear_log_probabilities(
        hidden, weight, targets, ignore_index=ignore_index, dtype=dtype
    )
    count = max(1, int((targets != ignore_index).sum()))
    loss = (z_loss * log_z**2 - log_p).sum() / count
    return (loss, log_p.detach(), log_z.detach()) if per_token else loss
