"""The cache as code from elsewhere reads and writes it: states by layer, and the end of a pass.

Letters: rows of the batch, J key/value heads, S tokens held, P head width.
"""

from collections.abc import Iterator, Mapping, MutableMapping
from typing import NoReturn

import torch
from torch import Tensor

from nemotron_v3.cache.data import CacheData
from nemotron_v3.cache.states import KeyValueState, MambaState


def held_by(cache: CacheData, layer_idx: int | None) -> tuple[int, ...]:
    """Tokens that a layer has of each row, in a pass that may have come to it already or not.

    A layer without a state has none of the present pass.
    """
    if cache._step is None:
        return tuple(cache._lengths)
    return cache._step.ends if layer_idx in cache._updated else cache._step.starts


class OutsideView(CacheData):
    """What a cache offers to code that was written for another one."""

    @property
    def has_previous_state(self) -> bool:
        """Whether any row holds a token. Setting it to True ends the forward pass."""
        return any(self.lengths)

    @has_previous_state.setter
    def has_previous_state(self, value: bool) -> None:
        """Raises ValueError for False where there are tokens, TypeError for another kind."""
        if not isinstance(value, bool):
            raise TypeError(f"has_previous_state is {value!r}: give True or False")
        if not value and self.has_previous_state:
            raise ValueError(
                f"has_previous_state = False on a cache that holds {list(self.lengths)} tokens "
                "would leave its states behind: clear(row) makes a row fresh, restore(snapshot) "
                "returns to what it held"
            )
        if value and self.withheld is None:
            self.finish()

    @property
    def conv_states(self) -> "MambaStates":
        """By layer: `[rows, conv_dim, conv_kernel]`, before activation, newest last.

        `conv_states[layer] = tensor` copies it into the state.
        """
        return MambaStates(self, "conv")

    @property
    def ssm_states(self) -> "MambaStates":
        """By layer: `[rows, heads, head width, state]`; written as `conv_states` is."""
        return MambaStates(self, "ssm")

    @property
    def key_cache(self) -> "HeldTokens":
        """By attention layer: the keys it holds, `[rows, J, S, P]`, a view to be read."""
        return HeldTokens(self, "keys")

    @property
    def value_cache(self) -> "HeldTokens":
        """By attention layer: the values it holds, `[rows, J, S, P]`, a view to be read."""
        return HeldTokens(self, "values")


class _ByLayer(Mapping[int, Tensor]):
    """One tensor of each layer that has a state of `kind`."""

    kind: type

    def __init__(self, cache: CacheData, name: str):
        self._cache, self._name = cache, name

    def _state(self, layer: int) -> MambaState | KeyValueState:
        state = self._cache.states.get(layer)
        if not isinstance(state, MambaState | KeyValueState) or type(state) is not self.kind:
            raise KeyError(f"layer {layer!r} has no such state: the layers are {list(self)}")
        return state

    def __getitem__(self, layer: int) -> Tensor:
        return getattr(self._state(layer), self._name)

    def __iter__(self) -> Iterator[int]:
        return (i for i, state in self._cache.states.items() if isinstance(state, self.kind))

    def __len__(self) -> int:
        return sum(1 for _ in self)

    def __repr__(self) -> str:
        return repr(dict(self))


class MambaStates(_ByLayer, MutableMapping[int, Tensor]):
    """The conv or SSM states; an assignment writes into the cache's own tensor."""

    kind = MambaState

    def __setitem__(self, layer: int, value: Tensor) -> None:
        """Raises KeyError for a layer without the state, ValueError for another shape, RuntimeError
        where the cache is withheld."""
        self._cache._refuse_withheld()
        state = self._state(layer)
        assert isinstance(state, MambaState)
        mine = getattr(state, self._name)
        if not isinstance(value, Tensor):
            raise TypeError(f"a state is a {type(value).__name__}: give a tensor")
        if value.shape != mine.shape:
            raise ValueError(
                f"a state {tuple(value.shape)} does not fit layer {layer}, whose {self._name} "
                f"state is {tuple(mine.shape)}"
            )
        if state.has_graph or (torch.is_grad_enabled() and value.requires_grad):
            setattr(state, self._name, value.to(mine.device, mine.dtype, copy=True))
        else:
            mine.copy_(value)

    def __delitem__(self, layer: int) -> NoReturn:
        raise TypeError("a layer keeps its state: clear(row) makes a row of all layers fresh")


class HeldTokens(_ByLayer):
    """The keys or the values; they are written by `update`."""

    kind = KeyValueState

    def __getitem__(self, layer: int) -> Tensor:
        return super().__getitem__(layer)[:, :, : max(held_by(self._cache, layer))]

    def __setitem__(self, layer: int, value: Tensor) -> NoReturn:
        raise TypeError(
            "keys and values cannot be assigned, since each row has its own length: "
            "update(keys, values, layer_idx) appends, crop and rollback take back"
        )
