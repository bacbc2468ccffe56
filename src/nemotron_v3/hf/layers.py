"""transformers' Nemotron-H layers, computed by this package's ops.

Each class takes the place of the class of the same name in a module that is there already: its
parameters, children, hooks and names stay, only `forward` is another. Names are transformers',
since FSDP, device maps and saved configs look classes up by name.

Letters: B batch, S sequence, T packed tokens, D hidden size, H query heads, J key/value heads, P
head width, L places in a cache.
"""

import inspect
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from transformers.activations import ACT2FN
from transformers.cache_utils import Cache
from transformers.models.nemotron_h import modeling_nemotron_h as theirs

from nemotron_v3 import ops
from nemotron_v3.config import BackendConfig, NemotronV3Config, canonical_block_type
from nemotron_v3.hf import opaque
from nemotron_v3.hf.border import Border
from nemotron_v3.hf.rows import project_rows
from nemotron_v3.hf.states import (
    layer_holds_tokens,
    mamba_states,
    one_cache,
    write_mamba_states,
)
from nemotron_v3.layers.fp32_params import KeepsFp32
from nemotron_v3.layers.hooks import is_observed, must_call
from nemotron_v3.layers.linear import project
from nemotron_v3.layout import SequenceLayout
from nemotron_v3.ops._long_attention import without_plans


def _alone(
    hidden_states: Tensor,
    attention_mask: Any,
    cache: Cache | None = None,
    layer: int = 0,
    block_type: str = "",
    position_ids: Tensor | None = None,
) -> Border:
    """What its own arguments say about the tokens of a layer that is called alone."""
    B, S = hidden_states.shape[:2]
    return Border.enter(
        (B, S),
        hidden_states.device,
        attention_mask=attention_mask,
        position_ids=position_ids,
        follows=layer_holds_tokens(cache, layer, block_type, B),
        cached=cache is not None,
    )


@dataclass(frozen=True)
class Settings:
    """What the accelerated modules of one model share.

    Attributes:
        config: the model's, typed.
        backend: which form of each op runs.
        loss: `"logits"` or `"linear"`, see `accelerate`.
    """

    config: NemotronV3Config
    backend: BackendConfig
    loss: str = "logits"


SETTINGS = "nemotron_v3_settings"
# The gated norm of a mixer; transformers 5.17 calls it by the model that it is taken from.
GATED_NORM = vars(theirs).get("NemotronHRMSNormGated") or theirs.Zamba2RMSNormGated
# Activations that ops compute themselves, and the experts' forward that calls its own.
RELU2 = type(ACT2FN["relu2"])
SILU = tuple(type(ACT2FN[name]) for name in ("silu", "swish"))
EXPERTS_LOOP = inspect.unwrap(theirs.NemotronHExperts.forward)


class Accelerated(nn.Module):
    """A module that `accelerate` has given its settings."""

    @property
    def settings(self) -> Settings:
        return self.__dict__[SETTINGS]

    @property
    def impl(self) -> str:
        return self.settings.backend.impl


class _KeepsWide(KeepsFp32):
    """Tensors named in `wide` that are fp32 or wider now stay so in `.to(torch.bfloat16)`."""

    wide: tuple[str, ...] = ()

    @property
    def fp32_tensors(self) -> tuple[str, ...]:
        own = {**self._parameters, **self._buffers}
        return tuple(n for n in self.wide if own[n] is not None and own[n].dtype.itemsize >= 4)


class NemotronHRMSNorm(Accelerated, theirs.NemotronHRMSNorm):
    def forward(self, hidden_states: Tensor) -> Tensor:
        """`[..., D]` -> `[..., D]` in the weight's dtype."""
        backend = self.settings.backend
        impl = "portable" if backend.rms_norm == "torch" else backend.impl
        return ops.rms_norm(
            hidden_states, self.weight, self.variance_epsilon, self.weight.dtype, impl=impl
        )


class NemotronHMLP(Accelerated, theirs.NemotronHMLP):
    def forward(self, x: Tensor, border: Border | None = None) -> Tensor:
        """`[..., D]` -> `[..., D]`; with a `border`, padding is left out and comes back 0."""
        if border is None or border.layout.token_index is None:
            return project(self.down_proj, self._activated(project(self.up_proj, x)))
        layout = border.on(x.device)
        h = self._activated(project_rows(self.up_proj, layout.pack(x), layout))
        return layout.unpack(project_rows(self.down_proj, h, layout))

    def _activated(self, h: Tensor) -> Tensor:
        if must_call(self.act_fn, RELU2):
            return self.act_fn(h)
        return ops.relu2(h, impl=self.impl)


class NemotronHTopkRouter(_KeepsWide, Accelerated, theirs.NemotronHTopkRouter):
    wide = ("e_score_correction_bias",)

    def forward(
        self, hidden_states: Tensor, return_logits: bool = False
    ) -> tuple[Tensor | None, Tensor, Tensor]:
        """`[T, D]` -> logits `[T, E]` or None, weights and expert numbers `[T, K]`.

        Logits and weights are fp32 or wider.
        """
        config = self.settings.config
        logits = None
        if return_logits:
            wide = torch.promote_types(hidden_states.dtype, torch.float32)
            with torch.autocast(hidden_states.device.type, enabled=False):
                logits = F.linear(hidden_states.to(wide), self.weight.to(wide))
        weights, indices = opaque.router(
            hidden_states,
            self.weight,
            self.e_score_correction_bias,
            top_k=config.num_experts_per_tok,
            n_group=config.n_group,
            topk_group=config.topk_group,
            norm_topk_prob=config.norm_topk_prob,
            scaling_factor=config.routed_scaling_factor,
            impl=self.impl,
        )
        return logits, weights, indices


class NemotronHExperts(Accelerated, theirs.NemotronHExperts):
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


class NemotronHMoE(Accelerated, theirs.NemotronHMoE):
    def forward(
        self,
        hidden_states: Tensor,
        attention_mask: Any = None,
        border: Border | None = None,
        layer_idx: int | None = None,
    ) -> Tensor:
        """`[B, S, D]` -> `[B, S, D]`; padding is not routed and comes back 0."""
        border = border or _alone(hidden_states, attention_mask)
        layout = border.on(hidden_states.device)
        x = layout.pack(hidden_states)  # [T, D]
        wanted = border.router_logits is not None
        logits, weights, indices = self.gate(x, return_logits=wanted)  # [T, E], [T, K] twice
        if wanted:
            border.router_logits[layer_idx] = layout.unpack(logits).flatten(0, 1)  # [B * S, E]
        routed = self.experts(project_rows(self.fc1_latent_proj, x, layout), indices, weights)
        routed = project_rows(self.fc2_latent_proj, routed, layout)
        return layout.unpack(routed + project_rows(self.shared_experts, x, layout))


class NemotronHAttention(Accelerated, theirs.NemotronHAttention):
    def forward(
        self,
        hidden_states: Tensor,
        attention_mask: Any = None,
        past_key_values: Cache | None = None,
        border: Border | None = None,
        cache: Cache | None = None,
        **kwargs: Any,
    ) -> tuple[Tensor, None]:
        """`[B, S, D]` -> `[B, S, D]`, and None where transformers may have attention weights."""
        cache = one_cache(past_key_values, cache)
        border = border or _alone(
            hidden_states,
            attention_mask,
            cache,
            self.layer_idx,
            "attention",
            kwargs.get("position_ids"),
        )
        layout = border.on(hidden_states.device)
        x = layout.pack(hidden_states)  # [T, D]
        q, k, v = (  # [T, H, P], [T, J, P] twice
            project_rows(layer, x, layout).unflatten(-1, (-1, self.head_dim))
            for layer in (self.q_proj, self.k_proj, self.v_proj)
        )
        if cache is None:
            y = self._attend(q, k, v, layout, border.mask)
        else:
            y = self._follow(q, k, v, layout, cache, border)
        return layout.unpack(project_rows(self.o_proj, y.flatten(-2), layout)), None

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

    def _follow(
        self,
        q: Tensor,
        k: Tensor,
        v: Tensor,
        layout: SequenceLayout,
        cache: Cache,
        border: Border,
    ) -> Tensor:
        """Attend to what the cache holds and to the new tokens, which it holds afterwards.

        A cache of transformers keeps padding at its places, so a mask says what is real.
        """
        B, S = layout.shape
        past = cache.get_seq_length(self.layer_idx) if border.follows else 0
        if isinstance(past, Tensor):  # of a static cache, which goes on counting in place
            past = past.clone()
        new = (layout.unpack(t).transpose(1, 2) for t in (k, v))  # [B, J, S, P]
        keys, values = cache.update(*new, self.layer_idx)  # [B, J, L, P]
        if not border.follows:
            mask = None if border.mask is None else border.mask[..., :S]
            return self._attend(q, k, v, layout, mask)
        known = isinstance(past, int) and keys.shape[2] == past + S
        if known and border.mask is None and border.columns is None:
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
        mask = border.mask
        if mask is None:
            mask = border.allowed(past, keys.shape[2], q.device)
        return layout.pack(_masked(layout.unpack(q), keys, values, mask, self.scaling))


class NemotronHMamba2Mixer(_KeepsWide, Accelerated, theirs.NemotronHMamba2Mixer):
    wide = ("A_log", "D", "dt_bias")

    def forward(
        self,
        hidden_states: Tensor,
        cache_params: Cache | None = None,
        attention_mask: Any = None,
        border: Border | None = None,
        cache: Cache | None = None,
        **kwargs: Any,
    ) -> Tensor:
        """`[B, S, D]` -> `[B, S, D]`, along each document from its first token or the cache."""
        cache = one_cache(cache_params, cache)
        border = border or _alone(
            hidden_states,
            attention_mask,
            cache,
            self.layer_idx,
            "mamba",
            kwargs.get("position_ids"),
        )
        layout = border.on(hidden_states.device)
        x = layout.pack(hidden_states)  # [T, D]
        zxbcdt = project_rows(self.in_proj, x, layout)  # [T, 2*H*P + 2*G*N + H]
        called = _is_called(self.conv1d, nn.Conv1d)
        called = _is_called(self.norm, GATED_NORM) or called
        called = must_call(self.act, *SILU) or called
        weights = None if called else self._weights()
        if cache is None:
            y, _, _ = self._scan(zxbcdt, weights, layout, return_final_states=False)
        else:
            y = self._follow(zxbcdt, weights, layout, cache)
        return layout.unpack(project_rows(self.out_proj, y, layout))

    def _follow(
        self,
        zxbcdt: Tensor,
        weights: tuple[Tensor | None, ...] | None,
        layout: SequenceLayout,
        cache: Cache,
    ) -> Tensor:
        """From the states of a cache, which it holds the next ones of afterwards."""
        held = mamba_states(cache, self.layer_idx)
        differentiable = torch.is_grad_enabled() and any(
            tensor.requires_grad for tensor in (zxbcdt, *self.parameters(), *(held or ()))
        )
        step = held is not None and layout.uniform_length == 1 and not differentiable
        if step and weights is not None:
            conv, ssm = held
            eps = self.settings.config.layer_norm_epsilon
            return opaque.mamba2_step(
                zxbcdt, *weights, conv_state=conv, ssm_state=ssm, eps=eps, **self._sizes()
            )
        states = {}
        if held is not None:
            conv, ssm = (t.clone() for t in held) if differentiable else held
            states = {"conv_states": conv, "ssm_states": ssm}
        y, conv, ssm = self._scan(zxbcdt, weights, layout, **states)
        exact = ssm.dtype == torch.float64  # a model in fp64 is there to be exact
        dtype = ssm.dtype if exact else self.settings.config.mamba_ssm_cache_dtype
        write_mamba_states(cache, self.layer_idx, conv, ssm, dtype)
        return y

    def _scan(
        self,
        zxbcdt: Tensor,
        weights: tuple[Tensor | None, ...] | None,
        layout: SequenceLayout,
        **states: Any,
    ) -> tuple[Any, ...]:
        config = self.settings.config
        if weights is None:
            return opaque.mamba2_by_modules(
                zxbcdt,
                self.conv1d,
                self.norm,
                self.dt_bias,
                self.A_log,
                self.D,
                taps=config.conv_kernel,
                chunk_size=config.chunk_size,
                layout=layout,
                act=self.act,
                **self._sizes(),
                **states,
            )
        return opaque.mamba2(
            zxbcdt,
            *weights,
            eps=config.layer_norm_epsilon,
            chunk_size=config.chunk_size,
            layout=layout,
            **self._sizes(),
            **states,
        )

    def _weights(self) -> tuple[Tensor | None, ...]:
        conv_weight, conv_bias = _fetched(self.conv1d, lambda conv: (conv.weight[:, 0], conv.bias))
        norm_weight = _fetched(self.norm, lambda norm: norm.weight)
        return conv_weight, conv_bias, self.dt_bias, self.A_log, self.D, norm_weight

    def _sizes(self) -> dict[str, Any]:
        settings = self.settings
        config = settings.config
        return {
            "n_groups": config.n_groups,
            "head_dim": config.mamba_head_dim,
            "state_size": config.ssm_state_size,
            "dt_limit": config.time_step_limit,
            "impl": settings.backend.impl,
        }


class NemotronHBlock(Accelerated, theirs.NemotronHBlock):
    def forward(
        self,
        hidden_states: Tensor,
        past_key_values: Cache | None = None,
        attention_mask: Any = None,
        position_ids: Tensor | None = None,
        use_cache: bool | None = False,
        border: Border | None = None,
        cache: Cache | None = None,
        **kwargs: Any,
    ) -> Tensor:
        """`x + mixer(norm(x))`: `[B, S, D]` -> `[B, S, D]`; fp32 with `residual_in_fp32`."""
        cache = one_cache(past_key_values, cache)
        kind = canonical_block_type(self.block_type)
        border = border or _alone(
            hidden_states, attention_mask, cache, self.layer_idx, kind, position_ids
        )
        if self.settings.config.residual_in_fp32:
            wide = torch.promote_types(hidden_states.dtype, torch.float32)
            hidden_states = hidden_states.to(wide)
        x = self.norm(hidden_states)
        match kind:
            case "mamba":
                y = self.mixer(x, cache=cache, border=border)
            case "attention":
                y, _ = self.mixer(x, cache=cache, border=border)
            case "moe":
                y = self.mixer(x, border=border, layer_idx=self.layer_idx)
            case _:
                y = self.mixer(x, border=border)
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
    """Whether nothing happens at a call but that accelerate brings weights and inputs together."""
    placed = type(getattr(module, "_hf_hook", None)).__name__ == "AlignDevicesHook"
    return placed and type(module) is kind and not is_observed(module, by_its_forward=False)


def _fetched(module: nn.Module, read: Callable[[nn.Module], Any]) -> Any:
    """What `read` finds in a child whose forward is not called, since an op does its work."""
    hook = getattr(module, "_hf_hook", None)
    if hook is None:
        return read(module)
    hook.pre_forward(module)  # accelerate: fetches weights that were offloaded
    found = read(module)
    hook.post_forward(module, None)
    return found
