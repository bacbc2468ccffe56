"""Targets of a loss: the words that should have come."""

import torch
from torch import Tensor

from nemotron_v3.ops import compat

IGNORE_INDEX = -100


def refuse_outside(targets: Tensor, vocabulary: int, ignore_index: int) -> None:
    """An `IndexError` for a target outside the vocabulary, where looking does not wait for a GPU.

    Compilers, transforms and fake tensors have no values to look at.
    """
    if (
        torch.compiler.is_compiling()
        or type(targets) is not Tensor
        or not targets.is_cpu
        or compat.current_transform() is not None
    ):
        return
    outside = ((targets < 0) | (targets >= vocabulary)) & (targets != ignore_index)
    if bool(outside.any()):
        token = int(outside.nonzero()[0])
        raise IndexError(
            f"the target of token {token} is {int(targets[token])}, outside the vocabulary of "
            f"{vocabulary}: give token ids, or {ignore_index} where nothing is to be learnt"
        )
