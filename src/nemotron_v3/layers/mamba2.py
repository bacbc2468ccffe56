"""The Mamba-2 mixer.

Letters: B batch, S sequence, T packed tokens, D hidden size, H heads, P head width, G groups, N
state, W conv taps.
"""

from collections.abc import Iterable
from typing import Any, cast

import torch
from torch import LongTensor, Tensor, nn

from nemotron_v3.cache.checks import check_states
from nemotron_v3.cache.states import MambaState
from nemotron_v3.config import BackendConfig, NemotronV3Config
from nemotron_v3.layers.context import ForwardContext
from nemotron_v3.layers.context_parallel import ContextParallelLayer
from nemotron_v3.layers.decode_weights import Mamba2Weights, Projection
from nemotron_v3.layers.fp32_params import KeepsFp32, at_least_fp32
from nemotron_v3.layers.functional import Mamba2Sizes, mamba2_mixer
from nemotron_v3.layers.hooks import is_observed
from nemotron_v3.layers.init import init_module, on_meta
from nemotron_v3.layers.inputs import grid_of
from nemotron_v3.layers.linear import make_linear
from nemotron_v3.layers.norm import NemotronV3MambaRMSNormGated


class NemotronV3Mamba2Mixer(ContextParallelLayer, KeepsFp32):
    """Projection, causal convolution, state-space scan, gated norm, projection (arXiv 2405.21060).

    `A_log`, `D` and `dt_bias` are parameters of the mixer itself and stay fp32 or wider whatever
    the mixer is cast to.

    Args:
        config: a `NemotronV3Config`, a transformers `NemotronHConfig`, or any object with those
            attributes; never changed.
        layer_idx: the layer's number in the model.
        backend: a `BackendConfig` or a foreign object with its fields; None is the default one.

    Raises:
        ValueError: a config that contradicts itself.
    """

    fp32_tensors: tuple[str, ...] = ("A_log", "D", "dt_bias")

    def __init__(self, config: Any, layer_idx: int, *, backend: BackendConfig | None = None):
        super().__init__()
        config = NemotronV3Config.from_any(config, "mamba")
        self.backend: BackendConfig = BackendConfig.from_any(backend, "mamba")
        self.layer_idx = layer_idx
        self.hidden_size: int = config.hidden_size
        self.num_heads: int = config.mamba_num_heads
        self.head_dim: int = config.mamba_head_dim
        self.intermediate_size: int = config.mamba_intermediate_size
        self.ssm_state_size: int = config.ssm_state_size
        self.n_groups: int = config.n_groups
        self.conv_dim: int = config.conv_dim
        self.conv_kernel_size: int = config.conv_kernel
        self.use_conv_bias: bool = config.use_conv_bias
        self.activation: str = config.mamba_hidden_act
        self.chunk_size: int = config.chunk_size
        self.time_step_limit: tuple[float, float] = config.time_step_limit
        self.time_step_min: float = config.time_step_min
        self.time_step_max: float = config.time_step_max
        self.time_step_floor: float = config.time_step_floor
        self.initializer_range: float = config.initializer_range

        factory_kwargs = {"bias": config.use_bias, "backend": self.backend, "dtype": config.dtype}
        self.in_proj: nn.Module = make_linear(
            self.hidden_size, config.in_proj_size, **factory_kwargs
        )
        self.conv1d: nn.Conv1d = nn.Conv1d(
            self.conv_dim,
            self.conv_dim,
            self.conv_kernel_size,
            groups=self.conv_dim,
            padding=self.conv_kernel_size - 1,
            bias=self.use_conv_bias,
            dtype=config.dtype,
        )
        wide = at_least_fp32(config.dtype)
        self.dt_bias: nn.Parameter = nn.Parameter(torch.empty(self.num_heads, dtype=wide))
        self.A_log: nn.Parameter = nn.Parameter(torch.empty(self.num_heads, dtype=wide))
        self.D = nn.Parameter(torch.empty(self.num_heads, dtype=wide))
        self.norm: NemotronV3MambaRMSNormGated = NemotronV3MambaRMSNormGated(
            self.intermediate_size,
            self.intermediate_size // self.n_groups,
            config.layer_norm_epsilon,
        ).to(config.dtype)
        self.out_proj: nn.Module = make_linear(
            self.intermediate_size, self.hidden_size, **factory_kwargs
        )
        if not on_meta(self):
            self.init_weights(config.num_hidden_layers, config.rescale_prenorm_residual)

    def forward(
        self,
        hidden_states: Tensor,
        attention_mask: Tensor | None = None,
        past_key_values: Any = None,
        cache_position: LongTensor | None = None,
        **kwargs: Any,
    ) -> Tensor:
        """Mix along each document from its first token.

        Args:
            hidden_states: `[B, S, D]`, or `[T, D]` without a batch dimension, in the model's dtype.
            attention_mask: `[B, S]`, 1 = real and 0 = padding, or None.
            past_key_values: a `NemotronHybridCache`: the tokens follow what it holds, and it is
                updated in place. A padding mask may then also cover what came before.
            cache_position: without effect: the cache knows the position of each row.
            **kwargs: `layout`, `cu_seqlens`, `seq_idx` and the rest of `SequenceLayout.resolve`.

        Returns:
            The shape and dtype of `hidden_states`; 0 at padding.

        Raises:
            ValueError: shapes, masks or layouts that do not fit.
            TypeError: an unknown keyword argument, or a cache of another kind.
        """
        context: ForwardContext | None = kwargs.get("context")
        if context is None:
            context = ForwardContext.enter(
                grid_of(hidden_states, self.hidden_size),
                hidden_states.device,
                attention_mask,
                past_key_values,
                kwargs,
                layer_idx=self.layer_idx,
                group=self.token_group,
            )
            with context.writing():
                return NemotronV3Mamba2Mixer.forward(self, hidden_states, context=context)
        state = None
        if context.cache is not None:
            sizes = (self.conv_dim, self.num_heads, self.head_dim, self.ssm_state_size)
            check_states(context.cache.states.get(self.layer_idx), self.layer_idx, *sizes)
            assert context.step is not None
            state = cast(MambaState, context.step.begin(self.layer_idx))
        elif context.carry is not None:
            state = context.carry.recurrent(self)
        layout = context.layout
        if layout.device != hidden_states.device:
            layout = context.on(hidden_states.device)
        x = layout.pack(hidden_states)  # [T, D]
        y = mamba2_mixer(x, self, self._weights(), self._sizes(), layout, state, local=self.local)
        return context.leave(y)

    def _weights(self) -> tuple[Tensor | None, ...] | None:
        """What an op reads in the place of conv1d and norm; None where these have to be called."""
        conv1d, norm = self.conv1d, self.norm
        plain = type(conv1d) is nn.Conv1d and type(norm) is NemotronV3MambaRMSNormGated
        if not plain or is_observed(conv1d, norm):
            return None
        wide: Iterable[Tensor] = (self.dt_bias, self.A_log, self.D)
        if self.local is not None:
            wide = map(self.local, wide)
        return (conv1d.weight[:, 0], conv1d.bias, *wide, norm.weight)

    def _sizes(self) -> Mamba2Sizes:
        return Mamba2Sizes(
            n_groups=self.n_groups,
            head_dim=self.head_dim,
            state_size=self.ssm_state_size,
            dt_limit=self.time_step_limit,
            chunk_size=self.chunk_size,
            eps=getattr(self.norm, "variance_epsilon", 0.0),  # of a norm that is not called
            taps=self.conv_kernel_size,
            impl=self.backend.impl,
        )

    def decode_weights(self) -> Mamba2Weights:
        """What a decode step reads."""
        bias = self.conv1d.bias
        return Mamba2Weights(
            in_proj=Projection.of(self.in_proj),
            conv_weight=self.conv1d.weight.detach()[:, 0],
            conv_bias=None if bias is None else bias.detach(),
            dt_bias=self.dt_bias.detach(),
            A_log=self.A_log.detach(),
            D=self.D.detach(),
            norm=self.norm.decode_weights(),
            out_proj=Projection.of(self.out_proj),
            head_dim=self.head_dim,
            n_groups=self.n_groups,
            state_size=self.ssm_state_size,
            dt_limit=self.time_step_limit,
        )

    def init_weights(
        self,
        num_hidden_layers: int,
        rescale_prenorm_residual: bool = True,
        buffer_device: torch.device | None = None,
    ) -> None:
        """Draw the weights anew (the table of `nemotron_v3.layers.init.init_`).

        Args:
            num_hidden_layers: of the whole model.
            rescale_prenorm_residual: draw out_proj with a spread smaller by
                sqrt(num_hidden_layers).
            buffer_device: move the layer there first; from the meta device, None means the CPU.
        """
        init_module(
            self,
            std=self.initializer_range,
            num_hidden_layers=num_hidden_layers,
            rescale_prenorm_residual=rescale_prenorm_residual,
            time_step=(self.time_step_min, self.time_step_max, self.time_step_floor),
            buffer_device=buffer_device,
        )
