"""Projections: the one place that knows which linear layer a backend asks for."""

from types import ModuleType

import torch
from torch import Tensor, nn

from nemotron_v3.config import BackendConfig
from nemotron_v3.layers.extra_state import keep_state_dict_names
from nemotron_v3.layers.hooks import is_observed
from nemotron_v3.ops.common import onednn


def make_linear(
    in_features: int,
    out_features: int,
    *,
    bias: bool,
    backend: BackendConfig,
    dtype: torch.dtype | None = None,
) -> nn.Module:
    """A projection that is called as a module, so that adapters, hooks and quantisation work on it.

    `linear="te"` is `transformer_engine.pytorch.Linear`, used through its documented arguments.

    Args:
        in_features, out_features: widths.
        bias: whether it adds one.
        backend: its `linear` field chooses the class.
        dtype: of the parameters; None is torch's default.

    Raises:
        ModuleNotFoundError: `linear="te"` where Transformer Engine is not installed.
    """
    if backend.linear == "torch":
        return nn.Linear(in_features, out_features, bias=bias, dtype=dtype)
    te = load_transformer_engine("linear")
    linear = te.Linear(
        in_features,
        out_features,
        bias=bias,
        params_dtype=dtype or torch.get_default_dtype(),
        device=torch.get_default_device(),
    )
    return keep_state_dict_names(linear)


def project(layer: nn.Module, x: Tensor) -> Tensor:
    """`layer(x)`; a plain linear layer that nobody looks into may run on a faster product.

    Raises:
        TypeError: `x` has another dtype than the weights, and no autocast brings them together.
    """
    if type(layer) is not nn.Linear:
        return layer(x)
    weight = layer.weight
    # Whoever looks into the layer may cast what comes in, and has to see a call of it.
    if x.dtype != weight.dtype:
        if not torch.compiler.is_compiling() and not is_observed(layer):
            _check_dtype(layer, x)
    elif (
        x.is_cpu
        and not torch.compiler.is_compiling()
        and x.numel() * weight.shape[0] >= onednn.SMALLEST
        and not is_observed(layer)
    ):
        y = onednn.linear(layer, x)
        if y is not None:
            return y
    return layer(x)


def _check_dtype(layer: nn.Linear, x: Tensor) -> None:
    kind = x.device.type
    if kind == "meta" or not torch.is_autocast_enabled(kind):
        raise TypeError(
            f"hidden states are {x.dtype}, the layer's weights {layer.weight.dtype}: cast the "
            f"hidden states, or the layer by .to({x.dtype}), or use torch.autocast"
        )


def load_transformer_engine(field: str) -> ModuleType:
    """`transformer_engine.pytorch`, for the backend field that asks for it.

    Raises:
        ModuleNotFoundError: it is not installed.
    """
    try:
        import transformer_engine.pytorch as te  # pyright: ignore[reportMissingImports] - optional
    except ModuleNotFoundError as error:
        default = getattr(BackendConfig(), field)
        raise ModuleNotFoundError(
            f"{field}='te' needs Transformer Engine, and {error.name!r} is not installed: install "
            f"transformer-engine[pytorch], or use BackendConfig({field}={default!r})",
            name=error.name,
        ) from error
    return te
