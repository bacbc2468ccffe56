"""The step that generation calls: one token a row for a cache, by a CUDA graph."""

from collections.abc import Mapping, Sequence

import torch
from torch import Tensor

from nemotron_v3.cache import NemotronHybridCache
from nemotron_v3.generation.graphs.drawing import Drawing
from nemotron_v3.generation.graphs.graph import graphs_of
from nemotron_v3.generation.graphs.slots import MOST_ENDS
from nemotron_v3.generation.sampling import Sampler
from nemotron_v3.model.protocol import CausalLM

# Tokens for which a row has places when a step is made, beside those that it holds.
AHEAD = 1024


class GraphStep:
    """Call it with tokens `[R]` for logits `[R, V]`, which the next call writes over; or `draw`.

    The cache stays behind until `settle`. A row whose token is among `ends` is not fed it, nor
    anything after it.

    Args:
        model: one that `why_not` has nothing against.
        cache: which nothing but this may touch as long as it is used.
        ends: the tokens that end a row; at most `MOST_ENDS`.
        steps: how many tokens a row will be fed at most.
        sampler: of the tokens, whose draws `draw` makes in its place.
    """

    def __init__(
        self,
        model: CausalLM,
        cache: NemotronHybridCache,
        ends: Sequence[int] = (),
        steps: int = AHEAD,
        sampler: Sampler | None = None,
    ):
        if len(ends) > MOST_ENDS:
            raise ValueError(f"{len(ends)} tokens end a row, a step knows {MOST_ENDS} at most")
        self._cache, self._lengths, self._fed = cache, cache.lengths, 0
        self._next: Tensor | None = None  # what was drawn last, and stands in the slots
        length = max(cache.lengths) + min(steps, AHEAD)
        self._sampler = sampler
        asked = None if sampler is None else sampler.asked
        self._graph = graphs_of(model).take(model, cache, length, asked)
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

    @property
    def _drawing(self) -> Drawing:
        drawing = self._graph.plan.drawing
        assert drawing is not None, "a step with a sampler has one"
        return drawing

    @torch.no_grad()
    def draw(self, tokens: Tensor) -> tuple[Tensor, Tensor | None]:
        """Feed tokens `[R]`, and choose the next: as the sampler's call on the logits.

        What is drawn stands already where the next step reads it: fed as it came, it costs nothing.
        """
        assert self._sampler is not None, "a step without a sampler has logits alone"
        graph, choice, rows = self._graph, self._drawing.choice, len(tokens)
        if self._next is None:
            self._drawing.load(self._sampler)  # which has drawn the first ones
        if tokens is not self._next:
            torch.clamp(tokens, min=0, out=graph.slots.tokens[:rows])
        self._drawing.advance(self._sampler)
        self._fed += 1
        graph.replay()
        self._next = choice.tokens[:rows].clone()
        logprobs = None if choice.logprobs is None else choice.logprobs[:rows].clone()
        return self._next, logprobs

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
        if self._sampler is not None and self._next is not None:
            self._drawing.store(self._sampler)

    def close(self) -> None:
        """Leave the graph to others."""
        self._graph.busy = False
