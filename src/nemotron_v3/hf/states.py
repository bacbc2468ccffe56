"""transformers' caches as the accelerated layers use them: read, written, and left theirs.

All states stay in transformers' own objects, in their own shapes, so that what is done with these
between two passes (reordering for beams, cropping, offloading) acts on them, and a cache may go
from an accelerated model to a plain one and back.
"""

from collections.abc import Iterator, Sequence
from typing import Any, cast

import torch
from torch import Tensor
from transformers.cache_utils import (
    Cache,
    CacheLayerMixin,
    DynamicCache,
    LinearAttentionCacheLayerMixin,
)
from transformers.modeling_outputs import MoeModelOutputWithPast

from nemotron_v3.config import NemotronV3Config
from nemotron_v3.layout import SequenceLayout
from nemotron_v3.layout.modes import capturing

# What arguments and outputs call a cache, since 5.24 and before.
_OUTPUTS = MoeModelOutputWithPast.__dataclass_fields__
CACHE_NAME = "cache" if "cache" in _OUTPUTS else "past_key_values"


def one_cache(past_key_values: Any, cache: Any) -> Any:
    """The one of both that is given; raises ValueError where they contradict each other."""
    if past_key_values is None or past_key_values is cache:
        return cache
    if cache is not None:
        raise ValueError(
            "cache and past_key_values are two names of one argument, and hold two caches: give "
            "one (a PEFT that does not know transformers 5.24 gives generate() its prefix beside "
            "the cache: generate with transformers 5.23)"
        )
    return past_key_values


def as_cache(cache: Any) -> Cache | None:
    """Raises TypeError for a cache that is not transformers'."""
    if cache is None or isinstance(cache, Cache):
        return cache
    raise TypeError(
        f"{CACHE_NAME} is a {type(cache).__name__}: an accelerated model takes "
        "transformers' caches, such as DynamicCache(config=model.config), whose "
        "update(keys, values, layer_idx) takes a prefix for each attention layer"
    )


def fresh_cache(hf_config: Any) -> Cache:
    """What transformers makes where use_cache is asked for and no cache given."""
    return DynamicCache(config=hf_config)


def holds_tokens(cache: Cache | None, config: NemotronV3Config, rows: int) -> bool:
    """Whether there is anything in the cache, without reading the device where possible.

    Tokens of a pass, or keys and values alone: a prefix that attention sees and no scan.

    Args:
        rows: of the new tokens.

    Raises:
        ValueError: a cache that was not made from the model's config, or one of another batch.
    """
    if cache is None:
        return False
    blocks = config.layers_block_type
    mamba, attention = (
        [i for i, block in enumerate(blocks) if block == kind] for kind in ("mamba", "attention")
    )
    return any(_holds_states(cache, layer, rows, attention) for layer in mamba) or any(
        _holds_keys(cache, layer, rows) for layer in attention
    )


def layer_holds_tokens(cache: Cache | None, layer: int, block_type: str, rows: int) -> bool:
    """`holds_tokens` of one layer."""
    holds = {"mamba": _holds_states, "attention": _holds_keys}.get(block_type)
    return cache is not None and holds is not None and holds(cache, layer, rows)


def _holds_states(cache: Cache, layer: int, rows: int, attention: Sequence[int] = ()) -> bool:
    """Whether the cache holds states of a mamba layer."""
    _check_fits(cache, layer, attention)
    if not cache.has_previous_state(layer):
        return False
    held: Any = cast(Any, cache.layers[layer])
    _check_rows(rows, held.conv_states[0], layer)
    return True


def _check_fits(cache: Cache, layer: int, attention: Sequence[int] = ()) -> None:
    """Raises ValueError unless the cache has a place for the states of a mamba layer."""
    held = cache.layers[layer] if layer < len(cache.layers) else None
    if isinstance(held, LinearAttentionCacheLayerMixin):
        return
    own = f"{type(cache).__name__}(config=model.config)"
    if isinstance(held, CacheLayerMixin) and held.get_seq_length() > 0:
        raise ValueError(
            f"the cache holds keys and values of {int(held.get_seq_length())} tokens for layer "
            f"{layer}, a mamba layer, which has none; PEFT's prefix tuning makes such caches: tune "
            f"a prompt or LoRA, or give a {own} whose attention layers {list(attention)} alone "
            "hold the prefix"
        )
    raise ValueError(
        f"the cache holds no state for the mamba layer {layer}: make it from the model's "
        f"config, such as {own}"
    )


def _holds_keys(cache: Cache, layer: int, rows: int) -> bool:
    """Whether the cache holds keys of an attention layer."""
    if layer >= len(cache.layers):
        return False
    if not isinstance(cache.layers[layer], CacheLayerMixin):
        raise ValueError(
            f"the cache has no place for keys of the attention layer {layer}: make it from the "
            f"model's config, such as {type(cache).__name__}(config=model.config)"
        )
    length = cache.get_seq_length(layer)
    if isinstance(length, Tensor) and capturing(length.device):
        return False  # the length cannot be read during capture; assume an empty cache
    if not length > 0:
        return False
    held: Any = cast(Any, cache.layers[layer])
    _check_rows(rows, held.keys, layer)
    return True


def _check_rows(rows: int, held: Tensor, layer: int) -> None:
    if held.shape[0] != rows:
        raise ValueError(
            f"the cache holds {held.shape[0]} rows in layer {layer}, the tokens have {rows}: give "
            "one row of tokens a row of the cache (cache.batch_repeat_interleave repeats its rows)"
        )


class MambaStates:
    """The conv state `[B, C, W]` and SSM state `[B, H, P, N]` of a layer in transformers' cache.

    They are the cache's own tensors, which keep their addresses: writing moves the cache on.

    Args:
        cache: transformers'.
        layer: the layer's number in it.
        layout: of the new tokens.
        ssm_dtype: that the SSM state is kept in, but for a model in fp64, which is there to be
            exact.

    Raises:
        ValueError: a cache that was not made from the model's config, or one that records what it
            held, which assisted decoding asks for.
    """

    def __init__(self, cache: Cache, layer: int, layout: SequenceLayout, ssm_dtype: torch.dtype):
        _check_fits(cache, layer)
        held: Any = cast(Any, cache.layers[layer])
        if getattr(held, "record_past", False):
            raise ValueError(
                "the cache records past states, for assisted decoding; an accelerated model does "
                "not: generate without an assistant, or call nemotron_v3.hf.undo(model) first"
            )
        self._cache, self._layer, self._layout = cache, layer, layout
        self._ssm_dtype = ssm_dtype
        self._held: tuple[Tensor, Tensor] | None = None  # None before the layer's first pass
        if cache.has_previous_state(layer):
            self._held = held.conv_states[0], held.recurrent_states[0]

    @property
    def has_graph(self) -> bool:
        held = self._held or ()
        return torch.is_grad_enabled() and any(tensor.requires_grad for tensor in held)

    def for_one_token(self) -> tuple[Tensor, Tensor] | None:
        if self._held is None or self._layout.uniform_length != 1 or self.has_graph:
            return None
        return self._held

    def pieces(self) -> Iterator[tuple[None, SequenceLayout]]:
        yield None, self._layout

    def read(self, tokens: Tensor, in_graph: bool) -> dict[str, Tensor]:
        if self._held is None:
            return {}
        conv, ssm = (t.clone() for t in self._held) if in_graph else self._held
        return {"conv_states": conv, "ssm_states": ssm}

    def write(self, conv: Tensor, ssm: Tensor) -> None:
        dtype = ssm.dtype if ssm.dtype == torch.float64 else self._ssm_dtype
        self._cache.update_conv_state(conv, self._layer, conv_kernel_size=conv.shape[-1])
        self._cache.update_recurrent_state(ssm.to(dtype), self._layer)

    def in_order(self, parts: Sequence[Tensor]) -> Tensor:
        return parts[0]
