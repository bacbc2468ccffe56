"""What a cache checks before it takes tokens or states: sizes, rows, room."""

from collections.abc import Collection, Iterable, Mapping, Sequence
from numbers import Integral
from typing import Any

import torch
from torch import Tensor

from nemotron_v3.cache.states import CacheSnapshot, KeyValueState, LayerState, MambaState
from nemotron_v3.config import NemotronV3Config
from nemotron_v3.layout import SequenceLayout


def shape_of(config: NemotronV3Config) -> dict[str, Any]:
    """The settings of a config that a cache depends on."""
    names = (
        "hybrid_override_pattern num_key_value_heads head_dim conv_dim conv_kernel "
        "mamba_num_heads mamba_head_dim ssm_state_size"
    )
    ssm_dtype = str(config.mamba_ssm_cache_dtype).removeprefix("torch.")
    return {name: getattr(config, name) for name in names.split()} | {"ssm_dtype": ssm_dtype}


def at_least(name: str, value: int, least: int) -> int:
    """`value`; raises TypeError for what is no integer, ValueError for one below `least`."""
    check_whole(name, [value])
    if value < least:
        raise ValueError(f"{name} must be at least {least}, got {value}")
    return int(value)


def check_dtype(dtype: Any) -> None:
    """Raises TypeError unless keys, values and conv states can have a dtype."""
    if not isinstance(dtype, torch.dtype) or not dtype.is_floating_point:
        raise TypeError(
            f"a cache cannot hold {dtype!r}: give a floating-point torch.dtype, the model's"
        )


def check_whole(name: str, values: Iterable[Any]) -> None:
    """Raises TypeError unless all are integers."""
    for value in values:
        if not isinstance(value, Integral) or isinstance(value, bool):
            raise TypeError(f"{name} is {value!r}, a {type(value).__name__}: give an integer")


def amounts_of(tokens: int | Sequence[int] | Tensor, rows: int) -> list[int]:
    """How many tokens to take back from each row."""
    given = tokens.tolist() if isinstance(tokens, Tensor) else tokens
    amounts = list(given) if isinstance(given, Sequence) else [given] * rows
    check_whole("an amount of tokens", amounts)
    if len(amounts) != rows:
        raise ValueError(f"{len(amounts)} amounts for {rows} rows: give one a row")
    return amounts


def numbers_of(name: str, value: Any) -> Tensor:
    """`value` as a tensor of numbers.

    Raises:
        TypeError: what is none, such as None or a slice.
    """
    try:
        return torch.as_tensor(value)
    except (TypeError, RuntimeError):
        kind = type(value).__name__
        raise TypeError(f"{name} are {value!r}, a {kind}: give numbers, such as [0, 2]") from None


def row_numbers(rows: Tensor | Sequence[int], held: int) -> list[int]:
    """`rows` as a list, each of them among the rows of a cache."""
    numbers = numbers_of("rows", rows).flatten().tolist()
    if any(isinstance(number, bool) for number in numbers):
        raise ValueError(f"rows {numbers} are a mask: give row numbers, mask.nonzero()")
    check_whole("a row", numbers)
    if not numbers or not all(0 <= row < held for row in numbers):
        raise ValueError(f"rows {numbers} are not all among the cache's {held}")
    return numbers


def check_rows(
    layout: SequenceLayout, held: Sequence[int], device: torch.device, max_length: int | None
) -> None:
    """Raises ValueError unless the tokens of a layout can follow rows that hold so many."""
    if len(layout.lengths) != len(held):
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


def check_positions(
    source: Any,
    lengths: Sequence[Any],
    floors: Sequence[Any],
    behind: Collection[Any],
    rows: int,
    window: int,
    layers: Collection[int],
) -> None:
    """Raises ValueError unless rows can be at these positions.

    Args:
        lengths: tokens of each row.
        floors: of each row, the earliest position that it may be taken back to.
        behind: layers that a step has passed by.
        rows, window, layers: of the cache.
    """
    if len(lengths) != rows or len(floors) != rows:
        raise ValueError(
            f"{source} holds {len(lengths)} rows and {len(floors)} floors, the cache has {rows}"
        )
    for name, numbers in (("lengths", lengths), ("floors", floors)):
        if not all(type(n) is int and 0 <= n < 2**62 for n in numbers):
            raise ValueError(f"{source} has {name} {list(numbers)}: they are numbers of tokens")
    for row, (length, floor) in enumerate(zip(lengths, floors, strict=True)):
        if not max(0, length - window) <= floor <= length:
            raise ValueError(
                f"{source} tells that row {row} of {length} tokens can be taken back to {floor}: a "
                f"rollback_window of {window} reaches {max(0, length - window)} to {length}"
            )
    known = all(type(layer) is int and layer in layers for layer in behind)
    if not known or len(set(behind)) != len(behind):
        raise ValueError(
            f"{source} names layers {list(behind)} as left out: the cache has {list(layers)}"
        )


def check_snapshot(
    snapshot: CacheSnapshot,
    states: Mapping[int, LayerState],
    rows: int,
    max_length: int | None,
    window: int,
) -> None:
    """Raises ValueError unless a snapshot can take the place of `states` in a cache."""
    if not isinstance(snapshot, CacheSnapshot):
        raise TypeError(
            f"the snapshot is a {type(snapshot).__name__}: give what snapshot() returned"
        )
    if len(snapshot.lengths) != rows or snapshot.states.keys() != states.keys():
        raise ValueError(
            f"the snapshot has {len(snapshot.lengths)} rows and layers "
            f"{list(snapshot.states)}, the cache {rows} and {list(states)}"
        )
    positions = (snapshot.lengths, snapshot.floors, snapshot.behind)
    check_positions("the snapshot", *positions, rows, window, states)
    check_room("the snapshot", max(snapshot.lengths), max_length)
    for layer, state in states.items():
        state.check_like(snapshot.states[layer], layer)


def no_state_error(layer: int | None, states: Mapping[int, LayerState]) -> ValueError:
    """What to raise for a layer that is not among `states`."""
    if layer is None:
        return ValueError(
            "layer None holds no keys or states: give layer_idx, the layer's number in the config "
            f"that the cache was made from, one of {list(states)}"
        )
    return ValueError(
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
            f"layer {layer!r} holds no keys and values: give the layer_idx of an attention layer"
        )
    heads, width = state.keys.shape[1::2]
    if k.shape != v.shape or k.shape[1:] != (heads, width):
        raise ValueError(
            f"keys {tuple(k.shape)} and values {tuple(v.shape)} of the new tokens do not fit the "
            f"cache: (tokens, {heads} heads, {width}) each"
        )


def check_states(
    state: LayerState | None, layer: int, conv_dim: int, heads: int, width: int, size: int
) -> None:
    """Raises ValueError unless a mixer of these sizes can move a layer's state on."""
    if not isinstance(state, MambaState):
        raise ValueError(
            f"layer {layer!r} holds no mamba states in this cache: give the mixer the layer_idx it "
            "has in the config the cache was made from"
        )
    found = (state.conv.shape[1], *state.ssm.shape[1:])
    if found != (conv_dim, heads, width, size):
        raise ValueError(
            f"the cache's layer {layer} has {found[0]} channels and states {found[1:]}, the mixer "
            f"{conv_dim} and {(heads, width, size)}: make the cache from the mixer's config"
        )


def check_conv(state: LayerState | None, layer: int, new: Tensor) -> None:
    """Raises ValueError unless `new` can be a layer's conv state, or its newest column."""
    if not isinstance(state, MambaState):
        raise ValueError(
            f"layer {layer!r} holds no conv state: give the layer_idx of a mamba layer"
        )
    rows, channels, taps = state.conv.shape
    if tuple(new.shape) not in ((rows, channels), (rows, channels, 1), (rows, channels, taps)):
        raise ValueError(
            f"a conv state {tuple(new.shape)} does not fit layer {layer}: give "
            f"{(rows, channels, taps)}, or the newest column {(rows, channels)}"
        )


def check_alike(number: int, cache: Any, first: Any, kind: type) -> Any:
    """`cache`; raises ValueError or TypeError unless its rows can stand behind the first's."""
    if not isinstance(cache, kind):
        raise TypeError(f"cache {number} is a {type(cache).__name__}: give caches")
    for name in ("dtype", "device", "max_length", "rollback_window"):
        mine, its = getattr(first, name), getattr(cache, name)
        if mine != its:
            raise ValueError(f"cache {number} has {name} {its}, cache 0 {mine}")
    if shape_of(cache.config) != shape_of(first.config):
        raise ValueError(f"cache {number} belongs to another config than cache 0")
    return cache
