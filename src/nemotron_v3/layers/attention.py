"""Grouped-query attention without any positional term.

Letters: B batch, S sequence, T packed tokens, D hidden size, H query heads, J key/value heads, P
head width.
"""

from typing import Any

import torch
from torch import Tensor, nn

from nemotron_v3 import ops
from nemotron_v3.cache import NemotronHybridCache
from nemotron_v3.cache.checks import check_keys
from nemotron_v3.config import BackendConfig, NemotronV3Config
from nemotron_v3.layers.border import as_cache, enter
from nemotron_v3.layers.init import init_module, on_meta
from nemotron_v3.layers.linear import make_linear, project
from nemotron_v3.layers.transformer_engine import make_te_attention
from nemotron_v3.layout import SequenceLayout


class NemotronV3Attention(nn.Module):
    """Causal grouped-query attention (Ainslie et al. 2023) without rotary embedding.

    Args:
        config: a `NemotronV3Config`, a transformers `NemotronHConfig`, or any object with those
            attributes; never changed.
        backend: a `BackendConfig` or a foreign object with its fields; None is the default one.
            `attn="sdpa"` runs `nemotron_v3.ops.attention` as `impl` says, `"flex"` its form on
            PyTorch's flex attention, `"te"` Transformer Engine's attention.

    Raises:
        ValueError: a config that contradicts itself.
        ModuleNotFoundError: `attn="te"` where Transformer Engine is not installed.
    """

    def __init__(self, config: Any, backend: BackendConfig | None = None):
        super().__init__()
        config = NemotronV3Config.from_any(config)
        self.backend = BackendConfig.from_any(backend)
        self.hidden_size = config.hidden_size
        self.num_attention_heads = config.num_attention_heads
        self.num_key_value_heads = config.num_key_value_heads
        self.head_dim = config.head_dim
        self.attention_bias = config.attention_bias
        self.attention_dropout = config.attention_dropout
        self.num_hidden_layers = config.num_hidden_layers
        self.initializer_range = config.initializer_range

        query_width = self.num_attention_heads * self.head_dim
        key_width = self.num_key_value_heads * self.head_dim
        kind = {"bias": self.attention_bias, "backend": self.backend, "dtype": config.dtype}
        self.q_proj = make_linear(self.hidden_size, query_width, **kind)
        self.k_proj = make_linear(self.hidden_size, key_width, **kind)
        self.v_proj = make_linear(self.hidden_size, key_width, **kind)
        self.o_proj = make_linear(query_width, self.hidden_size, **kind)
        self.core = make_te_attention(config) if self.backend.attn == "te" else ops.attention
        self.impl = "flex" if self.backend.attn == "flex" else self.backend.impl
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
                attend) or additive floats, which then decides alone.
            past_key_values: a `NemotronHybridCache`: the tokens follow what it holds, and it is
                updated in place; dropout does not act then. A padding mask may also cover what came
                before.
            layer_idx: the layer's number in the cache, needed with one.
            **attn_kwargs: `layout`, `cu_seqlens`, `seq_idx` and the rest of
                `SequenceLayout.resolve`; `position_ids` changes nothing.

        Returns:
            The shape and dtype of `hidden_states`; 0 at padding.

        Raises:
            ValueError: shapes, masks or layouts that do not fit; a 4-D mask with a cache.
            TypeError: an unknown keyword argument, or a cache of another kind.
        """
        cache = as_cache(past_key_values)
        is_4d = isinstance(attention_mask, Tensor) and attention_mask.dim() == 4
        mask = attention_mask if is_4d else None
        if mask is not None and cache is not None:
            raise ValueError(
                f"a 4-D attention_mask {tuple(mask.shape)} cannot be given with a cache, which "
                "knows what each row holds: give a padding mask"
            )
        padding_mask = attention_mask if mask is None else None
        layout = enter(hidden_states, self.hidden_size, padding_mask, attn_kwargs, cache)
        x = layout.pack(hidden_states)  # [T, D]
        q = project(self.q_proj, x).unflatten(
            -1, (self.num_attention_heads, self.head_dim)
        )  # [T, H, P]
        k = project(self.k_proj, x).unflatten(
            -1, (self.num_key_value_heads, self.head_dim)
        )  # [T, J, P]
        v = project(self.v_proj, x).unflatten(-1, (self.num_key_value_heads, self.head_dim))
        if cache is not None:
            return self._follow(q, k, v, layout, cache, layer_idx)
        y = self.core(
            q,
            k,
            v,
            layout=layout,
            mask=mask,
            dropout_p=self.attention_dropout if self.training else 0.0,
            impl=self.impl,
        )
        return layout.unpack(project(self.o_proj, y.flatten(-2)))

    def _follow(
        self,
        q: Tensor,
        k: Tensor,
        v: Tensor,
        layout: SequenceLayout,
        cache: NemotronHybridCache,
        layer_idx: int | None,
    ) -> Tensor:
        """Store the new keys and values, and attend to all that each row holds."""
        check_keys(cache.states.get(layer_idx), layer_idx, k, v)
        state, since = cache.states[layer_idx], cache.begun
        before = (state.keys, state.values)
        try:
            state, step = cache.begin(layer_idx, layout)
            keys, values = state.append(k, v, step, in_graph=q.requires_grad)
            y = ops.cached_attention(
                q,
                keys,
                values,
                layout=step.layout,
                starts=step.starts,
                positions=step.positions,
                impl=self.backend.impl,
            )
            return layout.unpack(project(self.o_proj, y.flatten(-2)))
        except BaseException:
            cache.abandon(layer_idx, before, since)
            raise

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
