"""The mixture-of-experts block: router, routed experts, shared expert, optional latent projection.

Letters: B batch, S sequence, T packed tokens, D hidden size, E experts, K experts a token, X width
the experts see (D, or the latent size), F expert width.
"""

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

from nemotron_v3.config import BackendConfig, MoEConfig
from nemotron_v3.layers.context import ForwardContext
from nemotron_v3.layers.context_parallel import ContextParallelLayer
from nemotron_v3.layers.decode_weights import MoEWeights, Projection
from nemotron_v3.layers.functional import moe_mixer
from nemotron_v3.layers.init import init_module, on_meta
from nemotron_v3.layers.inputs import grid_of
from nemotron_v3.layers.linear import make_linear
from nemotron_v3.layers.mlp import NemotronV3MLP
from nemotron_v3.layers.moe.dispatcher import ExpertDispatcher, LocalDispatcher
from nemotron_v3.layers.moe.even_router import EvenRouter
from nemotron_v3.layers.moe.experts import NemotronV3Experts
from nemotron_v3.layers.moe.router import NemotronV3Router


class NemotronV3MoE(ContextParallelLayer):
    """Routed squared-ReLU experts plus a shared one that sees every token.

    With a latent size the routed experts work between `fc1_latent_proj` and `fc2_latent_proj`; the
    router and the shared expert always see the full width.

    Args:
        config: a `MoEConfig` or a foreign object with its fields.
        mlp_bias: bias of the shared expert and the latent projections.
        initializer_range: standard deviation of a fresh draw.
        dtype: of the parameters; None is `config.dtype`, else torch's default.
        backend: a `BackendConfig`, a foreign one, or None for the default. With
            `fake_balanced_gate` tokens go to the experts evenly, whatever the router says.
        num_hidden_layers, rescale_prenorm_residual: of the model, for the first draw.

    Attributes:
        shared_experts: the shared MLP, `n_shared_experts` times as wide as one, or None.
        dispatcher: brings tokens to their experts and back; `LocalDispatcher` unless another is put
            in its place (experts spread over processes).

    Raises:
        ValueError: a config that asks for what the model does not have (a gated expert, say).
    """

    def __init__(
        self,
        config: Any,
        *,
        mlp_bias: bool = False,
        initializer_range: float = 0.02,
        dtype: torch.dtype | None = None,
        backend: BackendConfig | None = None,
        num_hidden_layers: int = 1,
        rescale_prenorm_residual: bool = True,
    ):
        super().__init__()
        config = MoEConfig.from_any(config)
        self.backend: BackendConfig = BackendConfig.from_any(backend, "moe")
        dtype = dtype or config.dtype
        self.hidden_size: int = config.dim
        self.initializer_range = initializer_range
        self.dispatcher: ExpertDispatcher = LocalDispatcher()
        router = EvenRouter if self.backend.fake_balanced_gate else NemotronV3Router
        self.gate: EvenRouter | NemotronV3Router = router(config, dtype, self.backend.impl)
        self.experts: NemotronV3Experts = NemotronV3Experts(config, dtype, self.backend.impl)
        factory_kwargs = {"bias": mlp_bias, "backend": self.backend, "dtype": dtype}
        self.shared_experts: NemotronV3MLP | None = None
        if config.n_shared_experts:
            self.shared_experts = NemotronV3MLP(
                config.dim,
                config.n_shared_experts * config.shared_expert_inter_dim,
                initializer_range=initializer_range,
                draw=False,
                **factory_kwargs,
            )
        self.fc1_latent_proj: nn.Module | None = None
        self.fc2_latent_proj: nn.Module | None = None
        if config.moe_latent_size is not None:
            self.fc1_latent_proj = make_linear(config.dim, config.moe_latent_size, **factory_kwargs)
            self.fc2_latent_proj = make_linear(config.moe_latent_size, config.dim, **factory_kwargs)
        if not on_meta(self):
            self.init_weights(num_hidden_layers, rescale_prenorm_residual)

    def forward(
        self, hidden_states: Tensor, attention_mask: Tensor | None = None, **layout_kwargs: Any
    ) -> Tensor:
        """Route the real tokens; padding is never routed.

        Args:
            hidden_states: `[B, S, D]`, or `[T, D]` without a batch dimension.
            attention_mask: `[B, S]`, 1 = real and 0 = padding, or None; a 4-D mask, which speaks of
                pairs of tokens, says nothing here.
            **layout_kwargs: `layout`, `cu_seqlens`, `seq_idx` and the rest of
                `SequenceLayout.resolve`. Offsets may end before the last token: what follows are
                real tokens too.

        Returns:
            The shape and dtype of `hidden_states`; 0 at padding.

        Raises:
            ValueError: shapes, masks or layouts that do not fit.
            TypeError: an unknown keyword argument.
        """
        context = layout_kwargs.get("context")
        if context is None:
            context = ForwardContext.enter(
                grid_of(hidden_states, self.hidden_size),
                hidden_states.device,
                attention_mask,
                layout_kwargs=layout_kwargs,
                is_stateless=True,
                group=self.token_group,
            )
        layout = context.layout
        if layout.device != hidden_states.device:
            layout = context.on(hidden_states.device)

        def route(x: Tensor) -> tuple[Tensor, Tensor]:
            return self.gate(x, layout)

        return context.leave(moe_mixer(layout.pack(hidden_states), self, route, self._routed))

    def _routed(self, x: Tensor, indices: Tensor, weights: Tensor) -> Tensor | Callable[[], Tensor]:
        """`[T, X]`: the weighted sum of each token's experts, wherever they are; a function that
        gives it where they are somewhere else."""
        dispatcher: Any = self.dispatcher
        # A dispatcher from elsewhere may know `dispatch` by its former name alone.
        # (A compiler follows `hasattr`, but no truth value of a method.)
        dispatch = dispatcher.dispatch if hasattr(dispatcher, "dispatch") else dispatcher.permute
        dispatched, metadata = dispatch(x, indices, weights)

        def finish() -> Tensor:
            return dispatcher.combine(dispatcher.compute(dispatched, self.experts), metadata)

        return finish if getattr(dispatcher, "arrives_later", False) else finish()

    def decode_weights(self) -> MoEWeights:
        """What a decode step reads."""
        shared, into, back = self.shared_experts, self.fc1_latent_proj, self.fc2_latent_proj
        return MoEWeights(
            router=self.gate,
            experts=self.experts,
            up_proj=self.experts.up_proj.detach(),
            down_proj=self.experts.down_proj.detach(),
            shared=None if shared is None else shared.decode_weights(),
            into_latent=None if into is None else Projection.of(into),
            from_latent=None if back is None else Projection.of(back),
        )

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
        if self.experts.low_rank is not None:
            self.experts.low_rank.init_weights()
