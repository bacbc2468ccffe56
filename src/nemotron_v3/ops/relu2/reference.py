"""The squared rectifier (README.md)."""

import torch
from torch import Tensor


def relu2(x: Tensor, *, dtype: torch.dtype = torch.float64) -> Tensor:
    """`relu(x)^2` (So et al. 2021, "Primer", arXiv 2109.08668).

    Args:
        x: any shape.
        dtype: what it is computed and returned in; float64 is the truth.
    """
    return torch.relu(x.to(dtype)) ** 2
