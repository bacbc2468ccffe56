"""Log-probabilities of documents of any length, every token with its whole history.

Short documents are packed, and a pass computes them at once. A long one goes through the model in
windows: the cache carries the states, so no token is computed twice, and what a window needs is
freed before the next. What grows with the document are the keys and values of attention layers,
which are its history.

Letters: T packed tokens.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from nemotron_v3.cache import NemotronHybridCache
from nemotron_v3.generation.score import log_probabilities
from nemotron_v3.layout import SequenceLayout
from nemotron_v3.layout.modes import outside_inference_mode
from nemotron_v3.model.protocol import CausalLM

NO_TARGET = -100

Read = Callable[[int, int], Tensor]
"""`read(start, count)`: tokens of a document from its token `start` on."""


@dataclass(frozen=True)
class Window:
    """What a pass over a part of a document gave.

    Attributes:
        start: the place in the document of the first token that was scored.
        scores: fp64 `[T]` on the CPU, log-probabilities in nats; 0 of tokens that do not count.
        counts: bool `[T]` on the CPU, whether a token counts.
    """

    start: int
    scores: Tensor
    counts: Tensor


class Scorer:
    """Scores documents with a model.

    A document is int tokens on the CPU; the complement `~id` stands for a token that is read and
    not counted, as `nemotron_v3.data` keeps a chat's.

    Args:
        model: the model, in the mode (`eval()`) it is to run in.
        window: tokens of a pass.

    Raises:
        ValueError: `window` is below 1.
    """

    def __init__(self, model: CausalLM, window: int):
        if window < 1:
            raise ValueError(f"window is {window}: give at least 1 token")
        self.model, self.window = model, window
        weight = model.model.embeddings.weight
        self.device, self.dtype = weight.device, weight.dtype

    def pack(self, documents: Sequence[Tensor]) -> list[Window]:
        """Whole documents of 2 tokens or more in one pass, one behind the other."""
        lengths = [len(document) - 1 for document in documents]
        layout = SequenceLayout.from_lengths(lengths, self.device)
        fed = torch.cat([document[:-1] for document in documents])
        targets = torch.cat([document[1:] for document in documents])
        scores = self._pass(fed, targets, layout, None)
        parts = zip(scores.split(lengths), targets.split(lengths), strict=True)
        return [Window(1, part, target >= 0) for part, target in parts]

    def new_cache(self, length: int) -> NemotronHybridCache:
        """For a document of so many tokens, with room for all of them."""
        room = max(length - 1, 1)
        return NemotronHybridCache(self.model.config, 1, self.dtype, self.device, max_length=room)

    def step(self, read: Read, length: int, cache: NemotronHybridCache) -> Window | None:
        """The next window of a document of `length` tokens; None at its end.

        Args:
            read: gives the document's tokens.
            length: of the document.
            cache: holds what was fed of it, and afterwards this window too.
        """
        held = cache.get_seq_length()
        count = min(self.window, length - 1 - held)
        if count <= 0:
            return None
        tokens = read(held, count + 1)
        layout = SequenceLayout.from_lengths([count], self.device)
        scores = self._pass(tokens[:-1], tokens[1:], layout, cache)
        return Window(held + 1, scores, tokens[1:] >= 0)

    @outside_inference_mode
    @torch.no_grad()
    def _pass(
        self,
        fed: Tensor,
        targets: Tensor,
        layout: SequenceLayout,
        cache: NemotronHybridCache | None,
    ) -> Tensor:
        """`[T]` and `[T]`, with complements -> fp64 `[T]` on the CPU."""
        fed = torch.where(fed < 0, ~fed, fed).to(self.device, torch.int64)
        asked = torch.where(targets < 0, NO_TARGET, targets).to(self.device, torch.int64)
        out = self.model.model(fed, layout=layout, past_key_values=cache)
        return log_probabilities(self.model, out.last_hidden_state, asked).to("cpu", torch.float64)
