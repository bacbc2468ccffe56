"""transformers' Nemotron-H layers, computed by this package's ops.

Each class takes the place of the class of the same name in a module that is there already: its
parameters, children, hooks and names stay, only `forward` is another. Names are transformers',
since FSDP, device maps and saved configs look classes up by name.

Letters: B batch, S sequence, T packed tokens, D hidden size, H query heads, J key/value heads, P
head width, L places in a cache.
"""

import inspect
from collections.abc import Callable
from functools import partial
from typing import Any, cast

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from transformers.activations import ACT2FN
from transformers.cache_utils import Cache
from transformers.models.nemotron_h import modeling_nemotron_h as theirs

from nemotron_v3 import ops
from nemotron_v3.config import canonical_block_type
from nemotron_v3.hf import opaque
from nemotron_v3.hf.classes import takes_place_of
from nemotron_v3.hf.context import TheirContext
from nemotron_v3.hf.rows import project_rows
from nemotron_v3.hf.settings import Accelerated
from nemotron_v3.hf.states import MambaStates, layer_holds_tokens, one_cache
from nemotron_v3.layers.fp32_params import KeepsFp32
from nemotron_v3.layers.functional import Mamba2Sizes, attention_mixer, mamba2_mixer, moe_mixer
from nemotron_v3.layers.hooks import is_observed, must_call
from nemotron_v3.layers.inputs import unknown_block_type
from nemotron_v3.layers.linear import project
from nemotron_v3.layout import SequenceLayout
from nemotron_v3.ops.common.long_attention import without_plans


def _alone(
    hidden_states: Tensor,
    attention_mask: Any,
    cache: Cache | None = None,
    layer: int = 0,
    block_type: str = "",
    position_ids: Tensor | None = None,
) -> TheirContext:
    """The context of a layer that is called alone, from its own arguments."""
    B, S = hidden_states.shape[:2]
    return TheirContext.read(
        (B, S),
        hidden_states.device,
        attention_mask=attention_mask,
        position_ids=position_ids,
        follows=layer_holds_tokens(cache, layer, block_type, B),
        cached=cache is not None,
    )


# The gated norm of a mixer; transformers 5.17 calls it by the model that it is taken from.
GATED_NORM = vars(theirs).get("NemotronHRMSNormGated") or vars(theirs)["Zamba2RMSNormGated"]
# Activations that ops compute themselves, and the experts' forward that calls its own.
RELU2 = type(ACT2FN["relu2"])
SILU = tuple(type(ACT2FN[name]) for name in ("silu", "swish"))
EXPERTS_LOOP = inspect.unwrap(theirs.NemotronHExperts.forward)


class _KeepsWide(KeepsFp32):
    """Tensors named in `wide` that are fp32 or wider now stay so in `.to(torch.bfloat16)`."""

    wide: tuple[str, ...] = ()

    @property
    def fp32_tensors(self) -> tuple[str, ...]:
        own = {**self._parameters, **self._buffers}
        return tuple(n for n in self.wide if own[n] is not None and own[n].dtype.itemsize >= 4)


@takes_place_of(theirs.NemotronHRMSNorm)
class NemotronHRMSNorm(Accelerated, theirs.NemotronHRMSNorm):
    def forward(self, hidden_states: Tensor) -> Tensor:
        """`[..., D]` -> `[..., D]` in the weight's dtype."""
        backend = self.settings.backend
        impl = "portable" if backend.rms_norm == "torch" else backend.impl
        return ops.rms_norm(
            hidden_states, self.weight, self.variance_epsilon, self.weight.dtype, impl=impl
        )


@takes_place_of(theirs.NemotronHMLP)
class NemotronHMLP(Accelerated, theirs.NemotronHMLP):
    def forward(self, x: Tensor, context: TheirContext | None = None) -> Tensor:
        """`[..., D]` -> `[..., D]`; with a `context`, padding is left out and comes back 0."""
        if context is None or context.layout.token_index is None:
            return project(self.down_proj, self._activated(project(self.up_proj, x)))
        layout = context.on(x.device)
        h = self._activated(project_rows(self.up_proj, layout.pack(x), layout))
        return layout.unpack(project_rows(self.down_proj, h, layout))

    def _activated(self, h: Tensor) -> Tensor:
        if must_call(self.act_fn, RELU2):
            return self.act_fn(h)
        return ops.relu2(h, impl=self.impl)


@takes_place_of(theirs.NemotronHTopkRouter)
class NemotronHTopkRouter(_KeepsWide, Accelerated, theirs.NemotronHTopkRouter):
    wide: tuple[str, ...] = ("e_score_correction_bias",)

    def forward(
        self, hidden_states: Tensor, return_logits: bool = False
    ) -> tuple[Tensor | None, Tensor, Tensor]:
        """`[T, D]` -> logits `[T, E]` or None, weights and expert numbers `[T, K]`.

        Logits and weights are fp32 or wider.
        """
        logits = None
        if return_logits:
            wide = torch.promote_types(hidden_states.dtype, torch.float32)
            with torch.autocast(hidden_states.device.type, enabled=False):
                logits = F.linear(hidden_states.to(wide), self.weight.to(wide))
        weights, indices = opaque.router(
            hidden_states,
            self.weight,
            self.e_score_correction_bias,
            # The module's own: blocks may differ where a model's config gives one number.
            top_k=self.top_k,
            n_group=self.num_group,
            topk_group=self.topk_group,
            norm_topk_prob=self.norm_topk_prob,
            scaling_factor=self.routed_scaling_factor,
            impl=self.impl,
        )
        return logits, weights, indices


_TheirExperts = cast(Any, theirs.NemotronHExperts)  # a decorator hides that it is a class


@takes_place_of(_TheirExperts)
class NemotronHExperts(Accelerated, _TheirExperts):
    def forward(self, hidden_states: Tensor, top_k_index: Tensor, top_k_weights: Tensor) -> Tensor:
        """`[T, X]`, expert numbers and weights `[T, K]` -> `[T, X]`."""
        if must_call(self.act_fn, RELU2):  # transformers' loop calls it for each expert
            return EXPERTS_LOOP(self, hidden_states, top_k_index, top_k_weights)
        return opaque.experts(
            hidden_states,
            top_k_index,
            top_k_weights,
            self.up_proj,
            self.down_proj,
            impl=self.impl,
        )


@takes_place_of(theirs.NemotronHMoE)
class NemotronHMoE(Accelerated, theirs.NemotronHMoE):
    def forward(
        self,
        hidden_states: Tensor,
        attention_mask: Any = None,
        context: TheirContext | None = None,
        layer_idx: int | None = None,
    ) -> Tensor:
        """`[B, S, D]` -> `[B, S, D]`; padding is not routed and comes back 0."""
        context = context or _alone(hidden_states, attention_mask)
        layout = context.on(hidden_states.device)

        def route(x: Tensor) -> tuple[Tensor, Tensor]:
            kept = context.router_logits
            # [T, E], [T, K] twice
            logits, weights, indices = self.gate(x, return_logits=kept is not None)
            if kept is not None and layer_idx is not None:
                kept[layer_idx] = layout.unpack(logits).flatten(0, 1)  # [B*S, E]
            return weights, indices

        x = layout.pack(hidden_states)  # [T, D]
        project = partial(project_rows, layout=layout)
        return layout.unpack(moe_mixer(x, self, route, self.experts, project=project))


@takes_place_of(theirs.NemotronHAttention)
class NemotronHAttention(Accelerated, theirs.NemotronHAttention):
    def forward(
        self,
        hidden_states: Tensor,
        attention_mask: Any = None,
        past_key_values: Cache | None = None,
        context: TheirContext | None = None,
        cache: Cache | None = None,
        **kwargs: Any,
    ) -> tuple[Tensor, None]:
        """`[B, S, D]` -> `[B, S, D]`, and None where transformers may have attention weights."""
        cache = one_cache(past_key_values, cache)
        context = context or _alone(
            hidden_states,
            attention_mask,
            cache,
            self.layer_idx,
            "attention",
            kwargs.get("position_ids"),
        )
        layout = context.on(hidden_states.device)

        def attend(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
            if cache is None:
                return self._attend(q, k, v, layout, context.mask)
            return self._attend_cached(q, k, v, layout, cache, context)

        x = layout.pack(hidden_states)  # [T, D]
        project = partial(project_rows, layout=layout)
        return layout.unpack(attention_mixer(x, self, attend, project=project)), None

    def _attend(
        self, q: Tensor, k: Tensor, v: Tensor, layout: SequenceLayout, mask: Tensor | None
    ) -> Tensor:
        backend = self.settings.backend
        return opaque.attention(
            q,
            k,
            v,
            layout=layout,
            mask=mask,
            scale=self.scaling,
            dropout_p=self.attention_dropout if self.training else 0.0,
            impl="flex" if backend.attn == "flex" else backend.impl,
        )

    def _attend_cached(
        self,
        q: Tensor,
        k: Tensor,
        v: Tensor,
        layout: SequenceLayout,
        cache: Cache,
        context: TheirContext,
    ) -> Tensor:
        """Attend to what the cache holds and to the new tokens, which it holds afterwards.

        A cache of transformers keeps padding at its places, so a mask says what is real.
        """
        B, S = layout.shape
        past = cache.get_seq_length(self.layer_idx) if context.follows else 0
        if isinstance(past, Tensor):  # a static cache counts on in place
            past = past.clone()
        k_rows, v_rows = (layout.unpack(t).transpose(1, 2) for t in (k, v))  # [B, J, S, P]
        keys, values = cache.update(k_rows, v_rows, self.layer_idx)  # [B, J, L, P]
        if not context.follows:
            mask = None if context.mask is None else context.mask[..., :S]
            return self._attend(q, k, v, layout, mask)
        plain = context.mask is None and context.columns is None
        if plain and isinstance(past, int) and keys.shape[2] == past + S:
            return opaque.cached_attention(
                q,
                keys,
                values,
                layout=layout,
                starts=(past,) * B,
                positions=torch.full((B,), past, device=q.device),
                scale=self.scaling,
                impl=self.impl,
            )
        mask = context.mask
        if mask is None:
            mask = context.allowed(past, keys.shape[2], q.device)
        return layout.pack(_masked(layout.unpack(q), keys, values, mask, self.scaling))


@takes_place_of(theirs.NemotronHMamba2Mixer)
class NemotronHMamba2Mixer(_KeepsWide, Accelerated, theirs.NemotronHMamba2Mixer):
    wide: tuple[str, ...] = ("A_log", "D", "dt_bias")

    def forward(
        self,
        hidden_states: Tensor,
        cache_params: Cache | None = None,
        attention_mask: Any = None,
        context: TheirContext | None = None,
        cache: Cache | None = None,
        **kwargs: Any,
    ) -> Tensor:
        """`[B, S, D]` -> `[B, S, D]`, along each document from its first token or the cache."""
        cache = one_cache(cache_params, cache)
        layer_idx = cast(int, self.layer_idx)  # every block numbers its mixer
        context = context or _alone(
            hidden_states,
            attention_mask,
            cache,
            layer_idx,
            "mamba",
            kwargs.get("position_ids"),
        )
        layout = context.on(hidden_states.device)
        state = None
        if cache is not None:
            dtype = self.settings.config.mamba_ssm_cache_dtype
            state = MambaStates(cache, layer_idx, layout, dtype)
        y = mamba2_mixer(
            layout.pack(hidden_states),
            self,
            self._weights(),
            self._sizes(),
            layout,
            state,
            project=partial(project_rows, layout=layout),
            ops=opaque,
            by_modules=opaque.mamba2_by_modules,
            act=self.act,
        )
        return layout.unpack(y)

    def _weights(self) -> tuple[Tensor | None, ...] | None:
        """The weights that an op reads instead of calling modules; None if they must be called."""
        called = _is_called(self.conv1d, nn.Conv1d)
        called = _is_called(self.norm, GATED_NORM) or called
        if must_call(self.act, *SILU) or called:
            return None
        conv_weight, conv_bias = _fetched(self.conv1d, lambda conv: (conv.weight[:, 0], conv.bias))
        norm_weight = _fetched(self.norm, lambda norm: norm.weight)
        return conv_weight, conv_bias, self.dt_bias, self.A_log, self.D, norm_weight

    def _sizes(self) -> Mamba2Sizes:
        config = self.settings.config
        return Mamba2Sizes(
            n_groups=config.n_groups,
            head_dim=config.mamba_head_dim,
            state_size=config.ssm_state_size,
            dt_limit=config.time_step_limit,
            chunk_size=config.chunk_size,
            eps=config.layer_norm_epsilon,
            taps=config.conv_kernel,
            impl=self.impl,
        )


@takes_place_of(theirs.NemotronHBlock)
class NemotronHBlock(Accelerated, theirs.NemotronHBlock):
    def forward(
        self,
        hidden_states: Tensor,
        past_key_values: Cache | None = None,
        attention_mask: Any = None,
        position_ids: Tensor | None = None,
        use_cache: bool | None = False,
        context: TheirContext | None = None,
        cache: Cache | None = None,
        **kwargs: Any,
    ) -> Tensor:
        """`x + mixer(norm(x))`: `[B, S, D]` -> `[B, S, D]`; fp32 with `residual_in_fp32`."""
        cache = one_cache(past_key_values, cache)
        kind = canonical_block_type(self.block_type)
        context = context or _alone(
            hidden_states, attention_mask, cache, self.layer_idx, kind, position_ids
        )
        if self.settings.config.residual_in_fp32:
            wide = torch.promote_types(hidden_states.dtype, torch.float32)
            hidden_states = hidden_states.to(wide)
        x = self.norm(hidden_states)
        match kind:
            case "mamba":
                y = self.mixer(x, cache=cache, context=context)
            case "attention":
                y, _ = self.mixer(x, cache=cache, context=context)
            case "moe":
                y = self.mixer(x, context=context, layer_idx=self.layer_idx)
            case "mlp":
                y = self.mixer(x, context=context)
            case _:
                raise unknown_block_type(kind)
        return hidden_states + y


def _masked(q: Tensor, keys: Tensor, values: Tensor, mask: Tensor, scale: float) -> Tensor:
    """`[B, S, H, P]` attends to `[B, J, L, P]` where `mask` `[B or 1, 1, S, <= L]` lets it."""
    places = keys.shape[2]
    if mask.shape[-1] > places:
        mask = mask[..., :places]
    # A softmax over nothing is 0/0: such a query is padding, and what it reads is dropped.
    is_bool = mask.dtype == torch.bool
    mask = mask | ~mask.any(-1, keepdim=True) if is_bool else mask.to(q.dtype)
    with without_plans(q):
        out = F.scaled_dot_product_attention(
            q.transpose(1, 2),
            keys[:, :, : mask.shape[-1]].to(q.dtype),
            values[:, :, : mask.shape[-1]].to(q.dtype),
            attn_mask=mask,
            scale=scale,
            enable_gqa=q.shape[2] != keys.shape[1],
        )
    return out.transpose(1, 2)


def _is_called(module: nn.Module, kind: type[nn.Module]) -> bool:
    """Whether the conv1d or norm of a mixer has to be called, which an op passes by otherwise.

    Raises:
        TypeError: an adapter stands in its place: PEFT's own compute other shapes.
    """
    if getattr(module, "base_layer", None) is not None:
        raise TypeError(
            f"a {type(module).__name__} stands in the place of a conv1d or norm whose "
            "weights an op reads: its adapter would have no effect; leave it out of the targets, "
            "or call nemotron_v3.hf.undo(model)"
        )
    return must_call(module, kind) and not _only_fetches(module, kind)


def _only_fetches(module: nn.Module, kind: type[nn.Module]) -> bool:
    """Whether the only hook is accelerate's, which brings weights and inputs together."""
    placed = type(getattr(module, "_hf_hook", None)).__name__ == "AlignDevicesHook"
    return placed and type(module) is kind and not is_observed(module, by_its_forward=False)


def _fetched(module: nn.Module, read: Callable[[Any], Any]) -> Any:
    """What `read` finds in a child whose forward is not called, since an op does its work."""
    hook = getattr(module, "_hf_hook", None)
    if hook is None:
        return read(module)
    hook.pre_forward(module)  # accelerate: fetches weights that were offloaded
    found = read(module)
    hook.post_forward(module, None)
    return found
