"""transformers' caches as the accelerated layers use them: read, written, and left theirs.

All states stay in transformers' own objects, in their own shapes, so that what is done with these
between two passes (reordering for beams, cropping, offloading) acts on them, and a cache may go
from an accelerated model to a plain one and back.
"""

from typing import Any

import torch
from torch import Tensor
from transformers.cache_utils import Cache, DynamicCache, LinearAttentionCacheLayerMixin

from nemotron_v3.config import NemotronV3Config


def as_cache(past_key_values: Any) -> Cache | None:
    """Raises TypeError for a cache that is not transformers'."""
    if past_key_values is None or isinstance(past_key_values, Cache):
        return past_key_values
    raise TypeError(
        f"past_key_values is a {type(past_key_values).__name__}: an accelerated model takes "
        "transformers' caches, such as DynamicCache(config=model.config)"
    )


def fresh_cache(hf_config: Any) -> Cache:
    """What transformers makes where use_cache is asked for and no cache given."""
    return DynamicCache(config=hf_config)


def holds_tokens(cache: Cache | None, config: NemotronV3Config) -> bool:
    """Whether a pass has been through the cache, without reading the device where possible.

    Raises:
        ValueError: a cache that was not made from the model's config.
    """
    if cache is None:
        return False
    blocks = config.layers_block_type
    if "mamba" in blocks:
        layer = blocks.index("mamba")
        _check_fits(cache, layer)
        return bool(cache.has_previous_state(layer))
    if "attention" in blocks:
        return bool(cache.get_seq_length(blocks.index("attention")) > 0)
    return False


def _check_fits(cache: Cache, layer: int) -> None:
    if layer >= len(cache.layers) or not isinstance(
        cache.layers[layer], LinearAttentionCacheLayerMixin
    ):
        raise ValueError(
            f"the cache holds no state for the mamba layer {layer}: make it from the model's "
            f"config, such as {type(cache).__name__}(config=model.config)"
        )


def mamba_states(cache: Cache, layer: int) -> tuple[Tensor, Tensor] | None:
    """A layer's conv state `[B, C, W]` and SSM state `[B, H, P, N]`; None before its first pass.

    They are the cache's own tensors: writing to them in place moves the cache on.

    Raises:
        ValueError: a cache that was not made from the model's config, or one that records what it
            held, which assisted decoding asks for.
    """
    _check_fits(cache, layer)
    held = cache.layers[layer]
    if getattr(held, "record_past", False):
        raise ValueError(
            "the cache records past states, for assisted decoding; an accelerated model does not: "
            "generate without an assistant, or call nemotron_v3.hf.undo(model) first"
        )
    if not cache.has_previous_state(layer):
        return None
    return held.conv_states[0], held.recurrent_states[0]


def write_mamba_states(
    cache: Cache, layer: int, conv: Tensor, ssm: Tensor, ssm_dtype: torch.dtype
) -> None:
    """Put a layer's states after a pass into the cache, whose tensors keep their addresses."""
    cache.update_conv_state(conv, layer, conv_kernel_size=conv.shape[-1])
    cache.update_recurrent_state(ssm.to(ssm_dtype), layer)
