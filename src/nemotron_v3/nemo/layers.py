"""NeMo AutoModel's Nemotron layers, computed by this package's ops.

Each class is put before the class of theirs that it is entered for: parameters, children, names and
all other methods stay theirs, only `forward` is another.

Letters: B batch, S sequence, T packed tokens, D hidden size, H query heads, J key/value heads, P
head width, L places in a cache.
"""

from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor, nn

from nemotron_v3 import ops
from nemotron_v3.layers.carry import Carry
from nemotron_v3.layers.functional import (
    Mamba2Sizes,
    RecurrentState,
    attention_mixer,
    mamba2_mixer,
)
from nemotron_v3.layers.hooks import is_observed
from nemotron_v3.layout import SequenceLayout
from nemotron_v3.nemo import shared_tokens
from nemotron_v3.nemo.classes import Accelerated, is_made, takes_place_of
from nemotron_v3.nemo.context import NemoContext, split_mask
from nemotron_v3.nemo.states import CachedStates


def _alone(
    hidden_states: Tensor,
    attention_mask: Any,
    cache: Any,
    told: dict[str, Any],
    *,
    layer: nn.Module,
    takes_pairs: bool = False,
) -> NemoContext:
    """What its own arguments say about the tokens of a layer that is called without a model.

    Raises:
        ValueError: a 4-D mask for a scan, which it tells nothing.
    """
    padding, mask = split_mask(attention_mask)
    if mask is not None and not takes_pairs:
        raise ValueError(
            f"attention_mask has shape {tuple(mask.shape)}: a scan takes a padding mask (batch, "
            "seq_len), and documents as seq_idx or cu_seqlens"
        )
    return NemoContext.read(
        tuple(hidden_states.shape[:-1]),
        hidden_states.device,
        padding=padding,
        mask=mask,
        cache=cache,
        told=told,
        group=shared_tokens.group_of(layer),
    )


@takes_place_of("layers.NemotronV3MambaRMSNormGated")
class GatedRMSNorm(Accelerated):
    weight: Tensor
    group_size: int
    variance_epsilon: float

    def forward(self, hidden_states: Tensor, gate: Tensor | None = None) -> Tensor:
        """`[..., C]`, and the gate alike or None -> `[..., C]`."""
        return ops.gated_rms_norm(
            hidden_states,
            gate,
            self.weight,
            self.group_size,
            self.variance_epsilon,
            impl=self.impl,
        )


class _MixerParts:
    """A mixer as `mamba2_mixer` sees it, with the three fp32 tensors that its holder has given."""

    def __init__(self, mixer: Any, fp32_tensors: tuple[Tensor, Tensor, Tensor]):
        self._mixer = mixer
        self.A_log, self.dt_bias, self.D = fp32_tensors
        self.in_proj, self.conv1d = mixer.in_proj, mixer.conv1d
        self.norm, self.out_proj = mixer.norm, mixer.out_proj

    def parameters(self) -> Iterator[Tensor]:
        return self._mixer.parameters()

    def weights(self) -> tuple[Tensor | None, ...] | None:
        """What an op reads in the place of conv1d and norm; None where these have to be called."""
        conv1d, norm = self.conv1d, self.norm
        plain = type(conv1d) is nn.Conv1d and isinstance(norm, GatedRMSNorm) and is_made(type(norm))
        if not plain or is_observed(conv1d) or is_observed(norm):
            return None
        weights = (conv1d.weight[:, 0], conv1d.bias)
        return (*weights, self.dt_bias, self.A_log, self.D, norm.weight)


@takes_place_of("layers.NemotronV3Mamba2Mixer")
class Mamba2Mixer(Accelerated):
    """Attributes are those of their mixer that `forward` reads."""

    cp: Any
    layer_idx: int
    n_groups: int
    head_dim: int
    ssm_state_size: int
    chunk_size: int
    conv_kernel_size: int
    time_step_limit: tuple[float, float]
    activation: str

    def forward(
        self,
        hidden_states: Tensor,
        attention_mask: Any = None,
        past_key_values: Any = None,
        cache_position: Tensor | None = None,
        *,
        context: NemoContext | None = None,
        **kwargs: Any,
    ) -> Tensor:
        """`[B, S, D]` or `[T, D]` -> the same, along each document from its first token or the
        cache's states; 0 at padding.

        Args:
            hidden_states: the tokens.
            attention_mask: a padding mask, or None.
            past_key_values: their NemotronHybridCache, which is updated in place.
            cache_position: without effect: the cache says whether it holds tokens.
            context: of the model's pass; then nothing else is read.
            **kwargs: what `NemoContext.read` knows.

        Raises:
            ValueError: what `NemoContext.read` raises; a `cp` that does not say which processes it
                is of.
        """
        if context is None:
            context = _alone(hidden_states, attention_mask, past_key_values, kwargs, layer=self)
        layout = context.on(hidden_states.device)
        state: RecurrentState | None = None
        if context.carry is not None:
            state = context.carry.recurrent(self)
        elif past_key_values is not None:
            state = CachedStates(past_key_values, self.layer_idx, layout, context.follows)
        x = layout.pack(hidden_states)  # [T, D]
        parts = _MixerParts(self, self._fp32_tensors(x))
        y = mamba2_mixer(x, parts, parts.weights(), self._sizes(), layout, state)
        return layout.unpack(y)

    def _fp32_tensors(self, x: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """`A_log`, `dt_bias` and `D`: through their holder, whose hooks gather what a sharder has
        spread; NeMo AutoModel 0.5 has none."""
        if hasattr(self, "_fp32_params"):
            return self._get_fp32_ssm_params(x)
        return self.A_log, self.dt_bias, self.D

    def _sizes(self) -> Mamba2Sizes:
        return Mamba2Sizes(
            n_groups=self.n_groups,
            head_dim=self.head_dim,
            state_size=self.ssm_state_size,
            dt_limit=(self.time_step_limit[0], self.time_step_limit[1]),
            chunk_size=self.chunk_size,
            eps=getattr(self.norm, "variance_epsilon", 0.0),  # of a norm that is not called
            taps=self.conv_kernel_size,
            impl=self.impl,
        )


@takes_place_of("layers.NemotronV3Attention")
class Attention(Accelerated):
    """Attributes are those of their layer that `forward` reads."""

    backend: Any
    attn_module: nn.Module | None
    attention_dropout: float
    head_dim: int

    def forward(
        self,
        hidden_states: Tensor,
        attention_mask: Any = None,
        past_key_values: Any = None,
        layer_idx: int | None = None,
        *,
        context: NemoContext | None = None,
        **kwargs: Any,
    ) -> Tensor:
        """`[B, S, D]` or `[T, D]` -> the same; causal inside each document.

        Args:
            hidden_states: the tokens.
            attention_mask: a padding mask; or a 4-D mask, which replaces the causal rule.
            past_key_values: their NemotronHybridCache, which stores all new tokens.
            layer_idx: the layer's number in it; None attends to the new tokens and stores none.
            context: of the model's pass; then nothing else is read.
            **kwargs: what `NemoContext.read` knows.

        Raises:
            ValueError: what `NemoContext.read` raises.
        """
        if self.backend.attn != "sdpa":  # Transformer Engine's attention, or another of theirs
            return super().forward(
                hidden_states, attention_mask, past_key_values, layer_idx, **kwargs
            )
        cache: Any = past_key_values
        if context is None:
            context = _alone(
                hidden_states, attention_mask, cache, kwargs, layer=self, takes_pairs=True
            )
        if context.carry is None:
            shared_tokens.refuse_ring(self)
        stores = cache is not None and layer_idx is not None
        layout = context.on(hidden_states.device)
        if stores or context.mask is not None:
            layout = whole_rows(layout)

        def attend(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
            if context.carry is not None:
                return self._attend_shared(q, k, v, context.carry, layer_idx)
            if cache is None or layer_idx is None:
                return self._attend(q, k, v, layout, context.mask)
            return self._attend_cached(q, k, v, layout, _Stored(cache, layer_idx), context)

        y = attention_mixer(layout.pack(hidden_states), self, attend)
        return layout.unpack(y)

    def setup_cp_attention(self, cp_mesh: Any) -> None:
        """Share the tokens of each call with the processes of a mesh.

        Raises:
            ValueError: no mesh of one dimension.
        """
        shared_tokens.share_attention(self, cp_mesh)

    def _attend_shared(
        self, q: Tensor, k: Tensor, v: Tensor, carry: Carry, layer_idx: int | None
    ) -> Tensor:
        if self.training and self.attention_dropout:
            shared_tokens.refuse_dropout()
        with shared_tokens.local_attention():
            return carry.attend(layer_idx, q, k, v, impl=self.impl)

    def _attend(
        self, q: Tensor, k: Tensor, v: Tensor, layout: SequenceLayout, mask: Tensor | None
    ) -> Tensor:
        dropout = self.attention_dropout if self.training else 0.0
        return ops.attention(q, k, v, layout=layout, mask=mask, dropout_p=dropout, impl=self.impl)

    def _attend_cached(
        self,
        q: Tensor,
        k: Tensor,
        v: Tensor,
        layout: SequenceLayout,
        stored: "_Stored",
        context: NemoContext,
    ) -> Tensor:
        """Attend to what the cache holds and to the new tokens, which it holds afterwards.

        Their cache keeps padding at its places, so a mask says what is real.
        """
        B, S = layout.shape
        held = stored.length
        new_keys, new_values = (layout.unpack(t).transpose(1, 2) for t in (k, v))  # [B, J, S, P]
        keys, values = stored.append(new_keys, new_values)  # [B, J, L, P]
        mask = context.mask
        if mask is None:
            mask = context.allowed(held, q.device)
        if held == 0:
            return self._attend(q, k, v, layout, mask)
        return ops.cached_attention(
            q,
            keys,
            values,
            layout=layout,
            starts=(held,) * B,
            positions=torch.full((B,), held, device=q.device),
            mask=mask,
            impl=self.impl,
        )


class _Stored:
    """The keys and values of one layer in their cache."""

    def __init__(self, cache: Any, layer_idx: int):
        self._cache, self._layer_idx = cache, layer_idx
        self.length: int = cache.get_seq_length(layer_idx)

    def append(self, keys: Tensor, values: Tensor) -> tuple[Tensor, Tensor]:
        """`[B, J, S, P]` twice -> all that is held, `[B, J, L, P]` twice."""
        return self._cache.update(keys, values, self._layer_idx)


def whole_rows(layout: SequenceLayout) -> SequenceLayout:
    """All places of each row, padding too, as one document: a mask decides what is seen."""
    return layout.derived(
        "whole rows", lambda layout: SequenceLayout.of_rows(layout.shape, layout.device)
    )
