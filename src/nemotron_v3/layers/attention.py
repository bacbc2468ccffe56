"""Grouped-query attention without any positional term.

Letters: B batch, S sequence, T packed tokens, D hidden size, H query heads, J key/value heads, P
head width.
"""

from typing import Any

import torch
from torch import Tensor

from nemotron_v3 import ops
from nemotron_v3.cache import NemotronHybridCache, held_by
from nemotron_v3.cache.checks import check_keys, check_layer
from nemotron_v3.config import BackendConfig, NemotronV3Config
from nemotron_v3.layers.border import as_cache, enter, is_4d
from nemotron_v3.layers.context_parallel import RefusesContextParallel, refuse
from nemotron_v3.layers.init import init_module, on_meta
from nemotron_v3.layers.linear import make_linear, project
from nemotron_v3.layers.transformer_engine import make_te_attention
from nemotron_v3.layout import SequenceLayout
from nemotron_v3.ops.cached_attention.masked import check_mask


class NemotronV3Attention(RefusesContextParallel):
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

    def __init__(self, config: Any, backend: BackendConfig | None = None):
        super().__init__()
        config = NemotronV3Config.from_any(config, "attention")
        self.backend = BackendConfig() if backend is None else backend
        self.chosen = chosen = BackendConfig.from_any(backend, "attention")
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
        kind = {"bias": self.attention_bias, "backend": chosen, "dtype": config.dtype}
        self.q_proj = make_linear(self.hidden_size, query_width, **kind)
        self.k_proj = make_linear(self.hidden_size, key_width, **kind)
        self.v_proj = make_linear(self.hidden_size, key_width, **kind)
        self.o_proj = make_linear(query_width, self.hidden_size, **kind)
        self.core = make_te_attention(config) if chosen.attn == "te" else ops.attention
        self.impl = "flex" if chosen.attn == "flex" else chosen.impl
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
        cache = as_cache(past_key_values)
        if cache is not None and layer_idx is None:
            check_layer(layer_idx, cache.states)
        mask = attention_mask if is_4d(attention_mask) else None
        padding_mask = attention_mask if mask is None else None
        layout = enter(
            hidden_states,
            self.hidden_size,
            padding_mask,
            attn_kwargs,
            cache,
            layer_idx=layer_idx,
            by_token=mask is not None,
        )
        x = layout.pack(hidden_states)  # [T, D]
        q = project(self.q_proj, x).unflatten(
            -1, (self.num_attention_heads, self.head_dim)
        )  # [T, H, P]
        k = project(self.k_proj, x).unflatten(
            -1, (self.num_key_value_heads, self.head_dim)
        )  # [T, J, P]
        v = project(self.v_proj, x).unflatten(-1, (self.num_key_value_heads, self.head_dim))
        if cache is not None:
            return self._follow(q, k, v, layout, cache, layer_idx, mask)
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
        mask: Tensor | None,
    ) -> Tensor:
        """Store the new keys and values, and attend to all that each row holds, or to what a mask
        says."""
        check_keys(cache.states.get(layer_idx), layer_idx, k, v)
        rows = layout
        if mask is not None:
            rows = rows_of(layout)
            check_mask(mask, q, rows, held_by(cache, layer_idx))
        state, since = cache.states[layer_idx], cache.begun
        before = (state.keys, state.values)
        try:
            state, step = cache.begin(layer_idx, rows)
            keys, values = state.append(k, v, step, in_graph=q.requires_grad)
            y = ops.cached_attention(
                q,
                keys,
                values,
                layout=step.layout,
                starts=step.starts,
                positions=step.positions,
                mask=mask,
                impl=self.chosen.impl,
            )
            return layout.unpack(project(self.o_proj, y.flatten(-2)))
        except BaseException:
            cache.abandon(layer_idx, before, since)
            raise

    def setup_cp_attention(self, cp_mesh: Any) -> None:
        """Raises ValueError: the layer cannot share a document's tokens with other processes."""
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


def rows_of(layout: SequenceLayout) -> SequenceLayout:
    """All tokens of each row as one document: a mask decides which of them see each other.

    Raises:
        ValueError: a layout with padding, which would not be stored.
    """
    B, S = layout.shape if len(layout.shape) == 2 else (1, *layout.shape)
    if layout.token_index is not None:
        raise ValueError(
            f"a layout of {layout.num_tokens} real tokens on a grid of {B * S} contradicts a 4-D "
            "mask with a cache, which stores all of them: give a padding mask"
        )
    return SequenceLayout.plain(B, S, layout.device)
