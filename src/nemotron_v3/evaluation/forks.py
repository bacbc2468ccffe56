"""Feeding a forest of token sequences: what several of them begin with is computed once.

The states behind a shared stretch are kept in a cache of one row, of which each sequence that goes
on takes a copy. What is deepest comes first, so that few states are held at a time.

Letters: T packed tokens, D width.
"""

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from nemotron_v3.cache import NemotronHybridCache
from nemotron_v3.evaluation.prefixes import LEAST_SAVED, Stretch, shared_prefixes
from nemotron_v3.layout import SequenceLayout
from nemotron_v3.layout.modes import outside_inference_mode
from nemotron_v3.model.protocol import CausalLM


@dataclass(frozen=True)
class Fed:
    """What a pass gave of a stretch.

    Attributes:
        stretch: of which tokens were fed.
        start: the first of them, counted in the stretch.
        hidden: `[T, D]`, what `model.model` gave for them.
    """

    stretch: Stretch
    start: int
    hidden: Tensor


class Forks:
    """Feeds sequences to a model.

    Args:
        model: the model, in the mode (`eval()`) it is to run in.
        window: tokens of a pass.
        rows: sequences that go on at a time.
        least: see `shared_prefixes`.
        before_pass: called before every pass; what it raises ends the work.

    Attributes:
        computed: tokens that went through the model.
    """

    def __init__(
        self,
        model: CausalLM,
        window: int,
        rows: int,
        least: int | None = LEAST_SAVED,
        before_pass: Callable[[], None] = lambda: None,
    ):
        self.model, self.window, self.rows, self.least = model, window, rows, least
        self.before_pass = before_pass
        weight = model.model.embeddings.weight
        self.device, self.dtype = weight.device, weight.dtype
        self.computed = 0

    def feed(self, sequences: Sequence[Sequence[int]]) -> Iterator[tuple[list[Fed], list[int]]]:
        """The hidden states of every token of the sequences by stretches, a pass at a time, and
        the numbers of the sequences that are complete with it."""
        for batch, are_leaves in self._batches(sequences, _length):
            fed = [stretch for stretch in batch if stretch.tokens]
            if fed:
                alone = are_leaves and all(stretch.parent is None for stretch in fed)
                alone = alone and sum(len(stretch.tokens) for stretch in fed) <= self.window
                for pieces in self._feed(fed, None if alone else self._rows(fed), not are_leaves):
                    yield pieces, []
            yield [], [number for stretch in batch for number in stretch.members]

    def leaves(
        self, sequences: Sequence[Sequence[int]]
    ) -> Iterator[tuple[list[int], NemotronHybridCache]]:
        """Some sequences at a time by their numbers, and a cache with a row for each, which holds
        what others share with it."""
        for batch, are_leaves in self._batches(sequences, lambda leaf: 0):
            if not are_leaves:
                for _ in self._feed(batch, self._rows(batch), True):
                    pass
                continue
            members = [(leaf, number) for leaf in batch for number in leaf.members]
            for at in range(0, len(members), self.rows):
                part = members[at : at + self.rows]
                self.before_pass()
                yield [number for _, number in part], self._rows([leaf for leaf, _ in part])

    def _batches(
        self, sequences: Sequence[Sequence[int]], cost: Callable[[Stretch], int]
    ) -> Iterator[tuple[list[Stretch], bool]]:
        """Stretches that are fed together, parents before children, and whether they are leaves."""
        inner: list[Stretch] = []
        leaves: list[Stretch] = []

        def reached(stretches: list[Stretch]) -> None:
            for stretch in stretches:
                stretch.waiting = len(stretch.children)
                (inner if stretch.children else leaves).append(stretch)

        reached(shared_prefixes(sequences, self.least))
        while inner or leaves:
            are_leaves = not inner or len(leaves) >= self.rows
            batch = self._take(leaves, cost) if are_leaves else self._take(inner, _length)
            yield batch, are_leaves
            for stretch in batch:
                reached(stretch.children)
                _leave(stretch)

    def _take(self, stack: list[Stretch], cost: Callable[[Stretch], int]) -> list[Stretch]:
        """The last ones that a pass has room for."""
        batch, room = [stack.pop()], self.window
        room -= cost(batch[0])
        while stack and len(batch) < self.rows and cost(stack[-1]) <= room:
            batch.append(stack.pop())
            room -= cost(batch[-1])
        return batch

    @outside_inference_mode
    @torch.no_grad()
    def _rows(self, stretches: Sequence[Stretch]) -> NemotronHybridCache:
        """A cache with a row for each, of what stands before it."""
        caches: list[NemotronHybridCache] = []
        at = 0
        while at < len(stretches):
            parent, count = stretches[at].parent, 1
            while at + count < len(stretches) and stretches[at + count].parent is parent:
                count += 1
            if parent is None:
                config = self.model.config
                caches.append(NemotronHybridCache(config, count, self.dtype, self.device))
            else:
                caches.append(parent.state.select([0] * count))
            at += count
        return caches[0] if len(caches) == 1 else NemotronHybridCache.cat(caches)

    def _feed(
        self, stretches: list[Stretch], cache: NemotronHybridCache | None, keep: bool
    ) -> Iterator[list[Fed]]:
        """Feed stretches, each behind its row of the cache; with `keep` they get their states."""
        longest = max(len(stretch.tokens) for stretch in stretches)
        chunk = longest
        if cache is not None and sum(len(stretch.tokens) for stretch in stretches) > self.window:
            chunk = max(1, self.window // len(stretches))
        for start in range(0, longest, chunk):
            self.before_pass()
            pieces = [stretch.tokens[start : start + chunk] for stretch in stretches]
            hidden = self._pass(pieces, cache)
            parts = hidden.split([len(piece) for piece in pieces])
            yield [Fed(s, start, part) for s, part in zip(stretches, parts, strict=True)]
        if keep and cache is not None:
            with torch.no_grad():
                for stretch, row in zip(stretches, cache.split(), strict=True):
                    stretch.state = row

    @outside_inference_mode
    @torch.no_grad()
    def _pass(self, pieces: list[list[int]], cache: NemotronHybridCache | None) -> Tensor:
        """The hidden states `[T, D]` of all pieces."""
        tokens = torch.tensor([token for piece in pieces for token in piece], device=self.device)
        layout = SequenceLayout.from_lengths([len(piece) for piece in pieces], self.device)
        self.computed += len(tokens)
        return self.model.model(tokens, layout=layout, past_key_values=cache).last_hidden_state


def _length(stretch: Stretch) -> int:
    return len(stretch.tokens)


def _leave(stretch: Stretch) -> None:
    """Free the states before a stretch, where no other needs them any more."""
    parent = stretch.parent
    if parent is not None:
        parent.waiting -= 1
        if not parent.waiting:
            parent.state = None
