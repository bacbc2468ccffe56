"""What a decode step's experts write into, made once.

Letters: R rows, D hidden size, E experts, K choices a row, F expert width, X width the experts see.
"""

from typing import NamedTuple, Self

import torch
from torch import Tensor


class Buffers(NamedTuple):
    """Every layer of a shape may share them: a layer has read them before the next one writes.

    Before the first choice nothing is chosen.

    Attributes:
        normed: `[R, D]`, the layer's input behind its norm.
        logits: fp32 `[R, E]`.
        weights: fp32 `[R, K]`.
        experts: int32 `[R, K]`, -1 for an inactive row.
        slots: int32 `[3, min(E, R K)]`: each expert that was chosen (-1 behind the last), where its
            choices begin in `choices` and how many they are.
        choices: int32 `[R K]`, numbers `row K + choice` by expert.
        counters: int32, 0 between two steps.
        h: `[R K, F]`; shared_h: `[R, F_SHARED]`.
        y: fp32 `[R K, X]`; shared_y: fp32 `[R, D]`.
    """

    normed: Tensor
    logits: Tensor
    weights: Tensor
    experts: Tensor
    slots: Tensor
    choices: Tensor
    counters: Tensor
    h: Tensor
    shared_h: Tensor
    y: Tensor
    shared_y: Tensor

    @classmethod
    def of(cls, like: Tensor, R: int, D: int, E: int, K: int, F: int, X: int, shared: int) -> Self:
        """For R rows; `like` has the device and the dtype of the layer's weights."""
        ints = {"dtype": torch.int32, "device": like.device}
        wide = {"dtype": torch.promote_types(like.dtype, torch.float32), "device": like.device}
        return cls(
            normed=like.new_empty(R, D),
            logits=torch.empty(R, E, **wide),
            weights=torch.empty(R, K, **wide),
            experts=torch.full((R, K), -1, **ints),
            slots=torch.full((3, min(E, R * K)), -1, **ints),
            choices=torch.zeros(R * K, **ints),
            counters=torch.zeros(R + 1, **ints),
            h=like.new_empty(R * K, F),
            shared_h=like.new_empty(R, shared),
            y=torch.empty(R * K, X, **wide),
            shared_y=torch.empty(R, D, **wide),
        )
