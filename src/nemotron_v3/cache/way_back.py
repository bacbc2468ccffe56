"""A way back to what a cache held at one moment, in less memory than a snapshot."""

import torch

from nemotron_v3.cache.cache import NemotronHybridCache
from nemotron_v3.cache.states import KeyValueState


class WayBack:
    """What `go` returns a cache to: what it holds now, while nothing but new tokens reaches it.

    Keys and values of earlier tokens are not copied, since new tokens leave them alone; other
    states are. So it costs one more copy of those, however long the rows are.

    Args:
        cache: in no pass.

    Raises:
        RuntimeError: the cache is withheld, or in the middle of a pass.
    """

    @torch.no_grad()
    def __init__(self, cache: NemotronHybridCache):
        cache._settle()
        self._cache = cache
        self._lengths, self._floors = list(cache._lengths), list(cache._floors)
        self._behind = cache._behind
        self._states = {
            layer: state.map(torch.clone)
            for layer, state in cache.states.items()
            if not isinstance(state, KeyValueState)
        }

    @torch.no_grad()
    def go(self) -> None:
        """Return; also what mends the cache that a failed forward pass left half-way."""
        cache, lengths = self._cache, self._lengths
        held = [row for row, length in enumerate(lengths) if length]
        fresh = cache._index([row for row, length in enumerate(lengths) if not length])
        rows, positions = cache._index(held), cache._index([lengths[row] for row in held])
        states = cache._without_graph()
        writes = {
            layer: state.taking_back(fresh, rows, positions)
            for layer, state in states.items()
            if layer not in self._states
        }
        with cache._writing(states):
            for layer, state in states.items():
                if layer in self._states:
                    state.load(self._states[layer], 0)
                else:
                    writes[layer]()
            cache._set_present(lengths, self._floors, self._behind)
