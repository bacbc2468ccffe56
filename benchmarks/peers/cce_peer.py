"""Cut cross entropy (arXiv 2411.09009), which also makes the gradients' logits block by block."""

from importlib.metadata import version

from cut_cross_entropy import linear_cross_entropy as _loss
from torch import Tensor

NAME = f"cut-cross-entropy {version('cut-cross-entropy')}"


def linear_cross_entropy(hidden: Tensor, weight: Tensor, targets: Tensor) -> Tensor:
    """With its usual filter, which skips blocks of small gradients."""
    return _loss(hidden, weight, targets)
