"""Projections: the one place that knows which linear layer a backend asks for."""

import torch
from torch import nn

from nemotron_v3.config import BackendConfig


def make_linear(
    in_features: int,
    out_features: int,
    *,
    bias: bool,
    backend: BackendConfig,
    dtype: torch.dtype | None = None,
) -> nn.Module:
    """A projection that is called as a module, so that adapters, hooks and quantisation work on it.

    Args:
        in_features, out_features: widths.
        bias: whether it adds one.
        backend: its `linear` field chooses the class.
        dtype: of the parameters; None is torch's default.

    Raises:
        NotImplementedError: `linear="te"`.
    """
    if backend.linear != "torch":
        raise NotImplementedError(
            f"linear={backend.linear!r} is not built yet: use BackendConfig(linear='torch')"
        )
    return nn.Linear(in_features, out_features, bias=bias, dtype=dtype)
