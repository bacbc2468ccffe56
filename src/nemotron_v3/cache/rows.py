"""New caches made of a cache's rows, and of several caches."""

from collections.abc import Callable, Sequence
from typing import Self

import torch
from torch import Tensor

from nemotron_v3.cache.checks import at_least, check_alike, row_numbers
from nemotron_v3.cache.data import CacheData
from nemotron_v3.cache.states import LayerState, join
from nemotron_v3.layout.modes import outside_inference_mode


class Rows(CacheData):
    """The methods of a `NemotronHybridCache` that make a new cache from its rows."""

    def select(self, rows: Tensor | Sequence[int]) -> Self:
        """A new cache of these rows, in this order, each as often as it is named.

        Raises:
            ValueError: a row outside the cache, or none.
        """
        self._settle()
        numbers = row_numbers(rows, self.batch_size)
        index = self._index(numbers)
        return self._with(
            lambda tensor: tensor.index_select(0, index),
            [self._lengths[row] for row in numbers],
            [self._floors[row] for row in numbers],
        )

    def repeat(self, n: int) -> Self:
        """A new cache with each row `n` times in a row, for several samples of one prompt."""
        at_least("n", n, 1)
        return self.select([row for row in range(self.batch_size) for _ in range(n)])

    def split(self) -> list[Self]:
        """One cache a row."""
        return [self.select([row]) for row in range(self.batch_size)]

    @classmethod
    @outside_inference_mode
    def cat(cls, caches: Sequence[Self]) -> Self:
        """The rows of several caches as one new cache.

        Raises:
            ValueError: no cache, or caches of different configs, dtypes, devices or windows.
        """
        if not caches:
            raise ValueError("cat needs at least one cache")
        first = caches[0]
        for number, cache in enumerate(caches):
            check_alike(number, cache, first, cls)._settle()
        joined = object.__new__(cls)
        joined.__dict__.update(first.__dict__)
        joined.states = {i: join([cache.states[i] for cache in caches]) for i in first.states}
        joined._updated = set()
        joined._behind = frozenset().union(*(cache._behind for cache in caches))
        joined.positions = torch.cat([cache.positions for cache in caches])
        joined._lengths = [n for cache in caches for n in cache._lengths]
        joined._floors = [n for cache in caches for n in cache._floors]
        return joined

    def to(self, device: torch.device | str) -> Self:
        """A cache with the same contents on `device`; itself if it is there already."""
        self._settle()
        place = torch.empty(0, device=device).device  # "cuda" is a device with a number
        if self.device == place:
            return self
        return self._with(lambda t: t.to(device), self._lengths, self._floors)

    def __copy__(self) -> Self:
        """A cache of its own: a shallow copy would share the tensors that steps write into, and
        not the lengths that go with them."""
        self._settle()
        return self._with(torch.clone, self._lengths, self._floors)

    def __deepcopy__(self, memo: dict[int, object]) -> Self:
        """The same, of states with a graph too: the copy is part of that graph."""
        memo[id(self)] = copied = self.__copy__()
        return copied

    # --- inside ---------------------------------------------------------------------------------

    def _index(self, numbers: Sequence[int]) -> Tensor:
        return torch.tensor(numbers, dtype=torch.int64, device=self.device)

    @outside_inference_mode
    def _map(self, function: Callable[[Tensor], Tensor]) -> dict[int, LayerState]:
        return {layer: state.map(function) for layer, state in self.states.items()}

    @outside_inference_mode
    def _with(
        self,
        function: Callable[[Tensor], Tensor],
        lengths: Sequence[int],
        floors: Sequence[int],
    ) -> Self:
        copy = object.__new__(type(self))
        copy.__dict__.update(self.__dict__)
        copy.states = self._map(function)
        copy.positions = function(self.positions)
        copy._updated = set()
        copy._lengths, copy._floors = list(lengths), list(floors)
        return copy
