"""The step that generation calls: one token a row for a cache, by a CUDA graph."""

from collections.abc import Mapping, Sequence

import torch
from torch import Tensor

from nemotron_v3.cache import NemotronHybridCache
from nemotron_v3.generation.graphs.graph import graphs_of
from nemotron_v3.generation.graphs.slots import MOST_ENDS
from nemotron_v3.model.protocol import CausalLM

# Tokens for which a row has places when a step is made, beside those that it holds.
AHEAD = 1024


class GraphStep:
    """Call it with tokens `[R]` for logits `[R, V]`, which the next call writes over.

    The cache stays behind until `settle`. A row whose token is among `ends` is not fed it, nor
    anything after it.

    Args:
        model: one that `why_not` has nothing against.
        cache: which nothing but this may touch as long as it is used.
        ends: the tokens that end a row; at most `MOST_ENDS`.
        steps: how many tokens a row will be fed at most.
    """

    def __init__(
        self,
        model: CausalLM,
        cache: NemotronHybridCache,
        ends: Sequence[int] = (),
        steps: int = AHEAD,
    ):
        if len(ends) > MOST_ENDS:
            raise ValueError(f"{len(ends)} tokens end a row, a step knows {MOST_ENDS} at most")
        self._cache, self._lengths, self._fed = cache, cache.lengths, 0
        length = max(cache.lengths) + min(steps, AHEAD)
        self._graph = graphs_of(model).take(model, cache, length)
        try:
            self._graph.slots.load(cache, list(ends))
        except BaseException:  # nobody will close it
            self.close()
            raise

    @property
    def slots(self) -> int:
        """How many rows the graph feeds, those that have ended and free places included."""
        return self._graph.slots.rows

    def has_room(self, steps: int) -> bool:
        """Whether so many more steps fit the buffers."""
        return max(self._lengths) + self._fed + steps <= self._graph.slots.capacity

    @torch.no_grad()
    def __call__(self, tokens: Tensor) -> Tensor:
        graph = self._graph
        graph.slots.tokens[: len(tokens)] = tokens
        self._fed += 1
        return graph.replay()[: len(tokens)]

    def end(self, rows: Sequence[int]) -> None:
        """Feed these rows nothing more, whatever their tokens are."""
        if rows:
            index = torch.tensor(rows, device="cpu").to(self._cache.device)
            self._graph.slots.active.index_fill_(0, index, 0)

    def settle(self, ended: Mapping[int, int]) -> None:
        """Write all rows back to the cache.

        Args:
            ended: the tokens that the cache holds of rows that have ended.
        """
        lengths = [ended.get(row, n + self._fed) for row, n in enumerate(self._lengths)]
        self._graph.slots.store(self._cache, lengths)

    def close(self) -> None:
        """Leave the graph to others."""
        self._graph.busy = False
