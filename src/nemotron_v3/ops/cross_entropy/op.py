"""The public loss, and the label shift that knows document borders."""

import torch
from torch import Tensor

from nemotron_v3.layout import SequenceLayout
from nemotron_v3.ops.common.precision import WIDE
from nemotron_v3.ops.common.selfcheck import Check
from nemotron_v3.ops.common.targets import IGNORE_INDEX, refuse_outside
from nemotron_v3.ops.cross_entropy import portable, reference
from nemotron_v3.ops.registry import Op

_OP = Op(
    "cross_entropy",
    reference=reference.cross_entropy,
    portable=portable.cross_entropy,
    check=Check("some-ignored"),
)


@_OP.public
def cross_entropy(
    logits: Tensor, targets: Tensor, *, ignore_index: int = IGNORE_INDEX, impl: str = "auto"
) -> Tensor:
    """Mean of `-log softmax(logits)[target]` over the targets that count, in nats.

    Letters: T packed tokens, V vocabulary.

    Args:
        logits: `[T, V]`, any float dtype; the loss is computed in fp32 or wider.
        targets: `[T]` int64 in [0, V); `ignore_index` does not count.
        impl: see `nemotron_v3.ops`.

    Returns:
        A scalar in fp32 or wider; 0, with zero gradients, where no target counts.

    Raises:
        ValueError: shapes that do not fit.
        IndexError: on a CPU, a target outside the vocabulary.
    """
    if logits.dim() != 2 or tuple(targets.shape) != tuple(logits.shape[:1]):
        raise ValueError(
            f"logits {tuple(logits.shape)} and targets {tuple(targets.shape)} do not fit: "
            "(tokens, vocabulary) and (tokens,)"
        )
    refuse_outside(targets, logits.shape[1], ignore_index)
    run = _OP.pick(impl, (logits,))
    return run(logits, targets, ignore_index=ignore_index).to(WIDE[logits.dtype])


def shift_labels(labels: Tensor, layout: SequenceLayout) -> Tensor:
    """The target of each packed token: the label of the next token of its document.

    Args:
        labels: int64 on the layout's grid, `[*layout.shape]`.
        layout: where the documents end; their last tokens have no target.

    Returns:
        int64 `[T]`, -100 where there is no target.

    Raises:
        ValueError: labels that do not cover the grid.
    """
    packed = layout.pack(labels)
    targets = torch.roll(packed, -1)
    return targets.index_fill(0, layout.last_tokens, IGNORE_INDEX)
