"""The conv and SSM states of a layer in NeMo AutoModel's cache: read, and written in place."""

from collections.abc import Iterator, Sequence
from typing import Any

import torch
from torch import Tensor

from nemotron_v3.layout import SequenceLayout


class CachedStates:
    """The conv state `[B, C, W]` and SSM state `[B, H, P, N]` of a layer in their cache.

    Both stay the cache's own tensors, in its dtype.

    Args:
        cache: their NemotronHybridCache.
        layer: the layer's number in it.
        layout: of the new tokens, one document a row.
        follows: whether the cache holds tokens already.

    Raises:
        ValueError: a cache of another batch, or without a place for the layer.
    """

    def __init__(self, cache: Any, layer: int, layout: SequenceLayout, follows: bool):
        if layer not in cache.ssm_states:
            raise ValueError(
                f"the cache has no place for the states of layer {layer}: make it from the model's "
                "config"
            )
        self._conv, self._ssm = cache.conv_states[layer], cache.ssm_states[layer]
        if self._ssm.shape[0] != layout.num_documents:
            raise ValueError(
                f"the cache holds {self._ssm.shape[0]} rows, the tokens have "
                f"{layout.num_documents}: give one row of tokens a row of the cache"
            )
        self._layout, self._follows = layout, follows

    @property
    def has_graph(self) -> bool:
        return torch.is_grad_enabled() and (self._conv.requires_grad or self._ssm.requires_grad)

    def for_one_token(self) -> tuple[Tensor, Tensor] | None:
        if not self._follows or self._layout.uniform_length != 1 or self.has_graph:
            return None
        return self._conv, self._ssm

    def pieces(self) -> Iterator[tuple[None, SequenceLayout]]:
        yield None, self._layout

    def read(self, tokens: Tensor, in_graph: bool) -> dict[str, Tensor]:
        if not self._follows:
            return {}
        conv, ssm = (self._conv, self._ssm)
        if in_graph:  # what is written in place afterwards would change what a graph has kept
            conv, ssm = conv.clone(), ssm.clone()
        return {"conv_states": conv, "ssm_states": ssm}

    def write(self, conv: Tensor, ssm: Tensor) -> None:
        self._conv.copy_(conv)
        self._ssm.copy_(ssm)

    def in_order(self, parts: Sequence[Tensor]) -> Tensor:
        return parts[0]
