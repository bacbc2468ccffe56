"""The loss of next-token prediction, one token after another (README.md).

T packed tokens, V vocabulary.
"""

import torch
from torch import Tensor

from nemotron_v3.layout import SequenceLayout


def cross_entropy(
    logits: Tensor,
    targets: Tensor,
    *,
    ignore_index: int = -100,
    dtype: torch.dtype = torch.float64,
) -> Tensor:
    """`sum_t (log sum_v exp(logits[t, v]) - logits[t, targets[t]]) / n` over the n real targets.

    Args:
        logits: `[T, V]`.
        targets: `[T]` integers; `ignore_index` is no target.
        ignore_index: the value that is left out of the sum and of the count.
        dtype: what everything is computed and returned in; float64 is the truth.

    Returns:
        A scalar in `dtype`; 0, with a gradient of zeros, where there is no target.
    """
    logits = logits.to(dtype)
    losses = []
    for row, target in zip(logits.unbind(0), targets.tolist(), strict=True):
        if target == ignore_index:
            continue
        shifted = row - row.detach().max()  # the largest exponential is 1
        losses.append(torch.log(torch.exp(shifted).sum()) - shifted[target])
    if not losses:
        return torch.zeros_like(logits).mul(logits).sum()
    return torch.stack(losses).sum() / len(losses)


def shift_labels(labels: Tensor, layout: SequenceLayout, *, ignore_index: int = -100) -> Tensor:
    """Token t's target is the label of token t + 1 of its document; the last token has none.

    Args:
        labels: `[*layout.shape]` integers.
        layout: where documents start.
        ignore_index: the target of a document's last token.

    Returns:
        `[T]`, one target a packed token.
    """
    targets = []
    for document in layout.pack(labels).split(list(layout.lengths)):
        if len(document):
            targets.append(torch.cat([document[1:], document.new_full((1,), ignore_index)]))
    return torch.cat(targets) if targets else layout.pack(labels)
