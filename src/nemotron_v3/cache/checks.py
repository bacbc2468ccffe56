"""What a cache checks before it takes tokens or states: sizes, rows, room."""

from collections.abc import Collection, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from nemotron_v3.cache.states import CacheSnapshot, KeyValueState, LayerState
from nemotron_v3.config import NemotronV3Config
from nemotron_v3.layout import SequenceLayout


def shape_of(config: NemotronV3Config) -> dict[str, Any]:
    """What of a config a cache depends on."""
    names = (
        "hybrid_override_pattern num_key_value_heads head_dim conv_dim conv_kernel "
        "mamba_num_heads mamba_head_dim ssm_state_size"
    )
    ssm_dtype = str(config.mamba_ssm_cache_dtype).removeprefix("torch.")
    return {name: getattr(config, name) for name in names.split()} | {"ssm_dtype": ssm_dtype}


def at_least(name: str, value: int, least: int) -> None:
    if value < least:
        raise ValueError(f"{name} must be at least {least}, got {value}")


def check_rows(
    layout: SequenceLayout, held: Sequence[int], device: torch.device, max_length: int | None
) -> None:
    """Raises ValueError unless the tokens of a layout can follow rows that hold so many."""
    if layout.num_documents != len(held):
        raise ValueError(
            f"{layout.num_documents} documents do not fit a cache of {len(held)} rows: "
            "one document a row is needed"
        )
    if layout.device != device:
        raise ValueError(f"tokens on {layout.device}, cache on {device}: move one of them")
    if max_length is None:
        return
    for row, (old, new) in enumerate(zip(held, layout.lengths, strict=True)):
        if old + new > max_length:
            raise ValueError(
                f"row {row} holds {old} tokens and gets {new}: more than the cache's "
                f"max_length {max_length}"
            )


def check_room(source: Any, length: int, max_length: int | None) -> None:
    if max_length is not None and length > max_length:
        raise ValueError(
            f"{source} holds {length} tokens a row: more than the cache's max_length {max_length}"
        )


def check_snapshot(
    snapshot: CacheSnapshot, states: Mapping[int, LayerState], rows: int, max_length: int | None
) -> None:
    """Raises ValueError unless a snapshot can take the place of `states` in a cache."""
    if len(snapshot.lengths) != rows or snapshot.states.keys() != states.keys():
        raise ValueError(
            f"the snapshot has {len(snapshot.lengths)} rows and layers "
            f"{list(snapshot.states)}, the cache {rows} and {list(states)}"
        )
    check_room("the snapshot", max(snapshot.lengths), max_length)
    for layer, state in states.items():
        state.check_like(snapshot.states[layer], layer)


def check_layer(layer: int | None, states: Mapping[int, LayerState]) -> None:
    if layer not in states:
        raise ValueError(
            f"layer {layer} has no state in this cache, whose layers are {list(states)}: give the "
            "layer_idx it has in the config"
        )


def check_no_step_missed(layer: int, behind: Collection[int], held: Sequence[int]) -> None:
    if layer in behind:
        raise RuntimeError(
            f"layer {layer} was left out of an earlier step, so it does not hold all of the "
            f"{list(held)} tokens of the rows: give each step to all layers; restore a snapshot, "
            "or make a new cache"
        )


def check_keys(state: LayerState | None, layer: int | None, k: Tensor, v: Tensor) -> None:
    """Raises ValueError unless packed keys and values `[T, J, P]` can stand in a layer's state."""
    if not isinstance(state, KeyValueState):
        raise ValueError(
            f"layer {layer} holds no keys and values: give the layer_idx of an attention layer"
        )
    heads, width = state.keys.shape[1], state.keys.shape[3]
    if k.shape != v.shape or tuple(k.shape[1:]) != (heads, width):
        raise ValueError(
            f"keys {tuple(k.shape)} and values {tuple(v.shape)} of the new tokens do not fit the "
            f"cache: (tokens, {heads} heads, {width}) each"
        )
