"""Grouped-query attention without any positional term.

Letters: B batch, S sequence, T packed tokens, D hidden size, H query heads, J key/value heads, P
head width.
"""

from collections.abc import Callable
from functools import partial
from typing import Any, cast

import torch
from torch import Tensor, nn

from nemotron_v3 import ops
from nemotron_v3.cache import NemotronHybridCache
from nemotron_v3.cache.checks import check_keys, no_state_error
from nemotron_v3.cache.states import KeyValueState
from nemotron_v3.config import BackendConfig, NemotronV3Config
from nemotron_v3.layers import graph_ops
from nemotron_v3.layers.context import ForwardContext
from nemotron_v3.layers.context_parallel import ContextParallelLayer, refuse
from nemotron_v3.layers.decode_weights import AttentionWeights, Projection
from nemotron_v3.layers.functional import attention_mixer
from nemotron_v3.layers.init import init_module, on_meta
from nemotron_v3.layers.inputs import grid_of
from nemotron_v3.layers.linear import make_linear
from nemotron_v3.layers.transformer_engine import make_te_attention
from nemotron_v3.layout import SequenceLayout
from nemotron_v3.ops.cached_attention.masked import check_mask


class NemotronV3Attention(ContextParallelLayer):
    """Causal grouped-query attention (Ainslie et al. 2023) without rotary embedding.

    Args:
        config: a `NemotronV3Config`, a transformers `NemotronHConfig`, or any object with those
            attributes; never changed.
        backend: a `BackendConfig` or a foreign object with its fields; None is the default one.
            `attn="sdpa"` runs `nemotron_v3.ops.attention` as `impl` says, `"flex"` its form on
            PyTorch's flex attention, `"te"` Transformer Engine's attention.

    Attributes:
        backend: what was given, a `BackendConfig()` for None.

    Raises:
        ValueError: a config that contradicts itself.
        ModuleNotFoundError: `attn="te"` where Transformer Engine is not installed.
    """

    layer_idx: int | None = None  # in a model's cache, of a layer in a block

    def __init__(self, config: Any, backend: BackendConfig | None = None):
        super().__init__()
        config = NemotronV3Config.from_any(config, "attention")
        self.backend: BackendConfig = BackendConfig() if backend is None else backend
        chosen = BackendConfig.from_any(backend, "attention")
        self.chosen: BackendConfig = chosen
        self.hidden_size: int = config.hidden_size
        self.num_attention_heads: int = config.num_attention_heads
        self.num_key_value_heads: int = config.num_key_value_heads
        self.head_dim: int = config.head_dim
        self.attention_bias: bool = config.attention_bias
        self.attention_dropout: float = config.attention_dropout
        self.num_hidden_layers: int = config.num_hidden_layers
        self.initializer_range: float = config.initializer_range

        query_width = self.num_attention_heads * self.head_dim
        key_width = self.num_key_value_heads * self.head_dim
        factory_kwargs = {"bias": self.attention_bias, "backend": chosen, "dtype": config.dtype}
        self.q_proj: nn.Module = make_linear(self.hidden_size, query_width, **factory_kwargs)
        self.k_proj: nn.Module = make_linear(self.hidden_size, key_width, **factory_kwargs)
        self.v_proj: nn.Module = make_linear(self.hidden_size, key_width, **factory_kwargs)
        self.o_proj: nn.Module = make_linear(query_width, self.hidden_size, **factory_kwargs)
        self.core: Callable[..., Any] = (
            make_te_attention(config) if chosen.attn == "te" else ops.attention
        )
        self.impl: str = "flex" if chosen.attn == "flex" else chosen.impl
        if not on_meta(self):
            self.init_weights(config.num_hidden_layers, config.rescale_prenorm_residual)

    def forward(
        self,
        hidden_states: Tensor,
        attention_mask: Tensor | None = None,
        past_key_values: Any = None,
        layer_idx: int | None = None,
        **attn_kwargs: Any,
    ) -> Tensor:
        """Attend within each document, up to and including the token itself.

        Args:
            hidden_states: `[B, S, D]`, or `[T, D]` without a batch dimension, in the model's dtype.
            attention_mask: `[B, S]`, 1 = real and 0 = padding; or `[B, 1, S, S]`, bool (True =
                attend) or additive floats, which then decides alone. With a cache it is
                `[B or 1, 1 or H, S, held + S]`: all S tokens are stored, and rows have to hold
                equally many.
            past_key_values: a `NemotronHybridCache`: the tokens follow what it holds, and it is
                updated in place; dropout does not act then. A padding mask may also cover what came
                before.
            layer_idx: the layer's number in the cache, needed with one.
            **attn_kwargs: `layout`, `cu_seqlens`, `seq_idx` and the rest of
                `SequenceLayout.resolve`; `position_ids` changes nothing.

        Returns:
            The shape and dtype of `hidden_states`; 0 at padding.

        Raises:
            ValueError: shapes, masks or layouts that do not fit; a 4-D mask where rows of the cache
                hold different numbers of tokens.
            TypeError: an unknown keyword argument, or a cache of another kind.
        """
        context: ForwardContext | None = attn_kwargs.get("context")
        if context is None:
            if isinstance(past_key_values, NemotronHybridCache) and layer_idx is None:
                raise no_state_error(layer_idx, past_key_values.states)
            context = ForwardContext.enter(
                grid_of(hidden_states, self.hidden_size),
                hidden_states.device,
                attention_mask,
                past_key_values,
                attn_kwargs,
                layer_idx=layer_idx,
                takes_4d_mask=True,
                group=self.token_group,
            )
            with context.writing():
                return NemotronV3Attention.forward(
                    self, hidden_states, layer_idx=layer_idx, context=context
                )
        if layer_idx is None:
            layer_idx = self.layer_idx
        layout = context.layout
        if layout.device != hidden_states.device:
            layout = context.on(hidden_states.device)
        attend = self._attend if context.cache is None else self._attend_cached
        attend = partial(attend, context, layout, layer_idx)
        return context.leave(attention_mixer(layout.pack(hidden_states), self, attend))

    def _attend(
        self,
        context: ForwardContext,
        layout: SequenceLayout,
        layer_idx: int | None,
        q: Tensor,
        k: Tensor,
        v: Tensor,
    ) -> Tensor:
        """`[T, H, P]`, `[T, J, P]` twice -> `[T, H, P]`: attend to the pass's own tokens."""
        if context.carry is not None:
            return context.carry.attend(layer_idx, q, k, v, impl=self.chosen.impl)
        mask, dropout_p = context.mask, self.attention_dropout if self.training else 0.0
        if torch.compiler.is_compiling() and self._is_node(mask, dropout_p, layout):
            return graph_ops.attention(q, k, v, layout=layout, impl=self.impl)
        return self.core(q, k, v, layout=layout, mask=mask, dropout_p=dropout_p, impl=self.impl)

    def _is_node(self, mask: Tensor | None, dropout_p: float, layout: SequenceLayout) -> bool:
        """Whether a compiler takes attention as one node of its graph."""
        plain = self.core is ops.attention and self.impl != "flex"
        return plain and mask is None and not dropout_p and graph_ops.can_take(layout)

    def _attend_cached(
        self,
        context: ForwardContext,
        layout: SequenceLayout,
        layer_idx: int | None,
        q: Tensor,
        k: Tensor,
        v: Tensor,
    ) -> Tensor:
        """The same behind a cache: append the new keys and values, and attend to all that each row
        holds, or to what a mask says."""
        assert context.cache is not None and context.step is not None
        held = None if layer_idx is None else context.cache.states.get(layer_idx)
        check_keys(held, layer_idx, k, v)
        state, mask = cast(KeyValueState, context.step.begin(layer_idx)), context.mask
        step = state.step
        if mask is not None:
            check_mask(mask, q, step.layout, step.starts)
        keys, values = state.append(k, v, in_graph=q.requires_grad)
        return ops.cached_attention(
            q,
            keys,
            values,
            layout=step.layout,
            starts=step.starts,
            positions=step.positions,
            mask=mask,
            impl=self.chosen.impl,
        )

    def decode_weights(self) -> AttentionWeights:
        """What a decode step reads."""
        return AttentionWeights(
            q_proj=Projection.of(self.q_proj),
            k_proj=Projection.of(self.k_proj),
            v_proj=Projection.of(self.v_proj),
            o_proj=Projection.of(self.o_proj),
            head_dim=self.head_dim,
        )

    def setup_cp_attention(self, cp_mesh: Any) -> None:
        """Raises ValueError: tokens are shared by `nemotron_v3.parallel`, not by this call."""
        refuse("setup_cp_attention", type(self).__name__)

    def init_weights(
        self,
        num_hidden_layers: int,
        rescale_prenorm_residual: bool = True,
        buffer_device: torch.device | None = None,
    ) -> None:
        """Draw the weights anew (the table of `nemotron_v3.layers.init.init_`).

        Args:
            num_hidden_layers: of the whole model.
            rescale_prenorm_residual: draw o_proj with a spread smaller by sqrt(num_hidden_layers).
            buffer_device: move the layer there first; from the meta device, None means the CPU.
        """
        init_module(
            self,
            std=self.initializer_range,
            num_hidden_layers=num_hidden_layers,
            rescale_prenorm_residual=rescale_prenorm_residual,
            buffer_device=buffer_device,
        )
