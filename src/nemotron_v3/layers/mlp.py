"""The squared-ReLU MLP. Letters: D hidden size, I intermediate size."""

from typing import Any

import torch
from torch import Tensor, nn

from nemotron_v3.config import BackendConfig, NemotronV3Config
from nemotron_v3.layers.context import ForwardContext
from nemotron_v3.layers.context_parallel import ContextParallelLayer
from nemotron_v3.layers.decode_weights import MLPWeights, Projection
from nemotron_v3.layers.init import init_module, on_meta
from nemotron_v3.layers.inputs import check_size, refuse_other_than_floats
from nemotron_v3.layers.linear import make_linear, project
from nemotron_v3.layout import SequenceLayout
from nemotron_v3.ops import relu2


class NemotronV3MLP(ContextParallelLayer):
    """`down_proj(relu(up_proj(x))^2)`, no gate (So et al. 2021, Primer).

    Args:
        hidden_size: D.
        intermediate_size: I.
        bias: of both projections.
        initializer_range: standard deviation of a fresh draw.
        dtype: of the parameters; None is torch's default.
        backend: its `linear` field chooses the projections.
        num_hidden_layers, rescale_prenorm_residual: of the model, for the first draw.
        draw: False leaves the first draw to a layer that holds this one.
    """

    def __init__(
        self,
        hidden_size: int,
        intermediate_size: int,
        *,
        bias: bool = False,
        initializer_range: float = 0.02,
        dtype: torch.dtype | None = None,
        backend: BackendConfig | None = None,
        num_hidden_layers: int = 1,
        rescale_prenorm_residual: bool = True,
        draw: bool = True,
    ):
        super().__init__()
        check_size("hidden_size", hidden_size)
        check_size("intermediate_size", intermediate_size)
        self.hidden_size = hidden_size
        self.intermediate_size = intermediate_size
        self.initializer_range = initializer_range
        backend = BackendConfig.from_any(backend, "mlp")
        self.impl: str = backend.impl
        factory_kwargs = {"bias": bias, "backend": backend, "dtype": dtype}
        self.up_proj: nn.Module = make_linear(hidden_size, intermediate_size, **factory_kwargs)
        self.down_proj: nn.Module = make_linear(intermediate_size, hidden_size, **factory_kwargs)
        if draw and not on_meta(self):
            self.init_weights(num_hidden_layers, rescale_prenorm_residual)

    @classmethod
    def from_config(cls, config: Any, backend: BackendConfig | None = None) -> "NemotronV3MLP":
        """The MLP of an `-` block."""
        config = NemotronV3Config.from_any(config, "mlp")
        return cls(
            config.hidden_size,
            config.intermediate_size,
            bias=config.mlp_bias,
            initializer_range=config.initializer_range,
            dtype=config.dtype,
            backend=backend,
            num_hidden_layers=config.num_hidden_layers,
            rescale_prenorm_residual=config.rescale_prenorm_residual,
        )

    def forward(
        self,
        hidden_states: Tensor,
        layout: SequenceLayout | None = None,
        context: ForwardContext | None = None,
    ) -> Tensor:
        """`[..., D]` -> `[..., D]`; each token is by itself: layout and context say nothing.

        Raises:
            ValueError: another hidden size.
            TypeError: no tensor of floats, or one of another dtype than the layer's.
        """
        if not isinstance(hidden_states, Tensor) or not hidden_states.is_floating_point():
            refuse_other_than_floats(hidden_states)
        if hidden_states.shape[-1:] != (self.hidden_size,):
            raise ValueError(
                f"hidden size {hidden_states.shape[-1:].numel()} does not match the layer's "
                f"{self.hidden_size}: give hidden states of shape (..., {self.hidden_size})"
            )
        return project(self.down_proj, relu2(project(self.up_proj, hidden_states), impl=self.impl))

    def decode_weights(self) -> MLPWeights:
        """What a decode step reads."""
        return MLPWeights(Projection.of(self.up_proj), Projection.of(self.down_proj))

    def init_weights(
        self,
        num_hidden_layers: int,
        rescale_prenorm_residual: bool = True,
        buffer_device: torch.device | None = None,
    ) -> None:
        """Draw the weights anew (the table of `nemotron_v3.layers.init.init_`)."""
        init_module(
            self,
            std=self.initializer_range,
            num_hidden_layers=num_hidden_layers,
            rescale_prenorm_residual=rescale_prenorm_residual,
            buffer_device=buffer_device,
        )
