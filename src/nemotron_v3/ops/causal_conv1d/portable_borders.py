"""Where a convolution over packed tokens meets the borders of documents.

Letters: T packed tokens, n_docs documents, W taps.

The packed tokens are convolved as one stream, which is wrong for the first W - 1 tokens of a
document alone: their taps reach into the document before it. These *heads* are computed apart, each
document's behind its own state.
"""

from bisect import bisect_left
from dataclasses import dataclass

import torch
from torch import Tensor

from nemotron_v3.layout import SequenceLayout


@dataclass(frozen=True)
class Places:
    """Which places of a table, row by row in one list, are filled, and with which rows of what.

    `places` and `sources` are int64 of one length; no source occurs twice, so that adding at the
    sources does not depend on an order.
    """

    places: Tensor
    sources: Tensor


@dataclass(frozen=True)
class Borders:
    """
    Attributes:
        heads: the table `[n_docs, W - 1]` of the first tokens of each document; sources are tokens,
            in rising order.
        head_tokens: the same sources, on the host.
        head_counts: how many of them lie before each document's, `[n_docs + 1]` on the host.
        final_tokens: the table `[n_docs, W]` of the last W inputs of each document, from its
            tokens.
        final_states: the same, from its initial state; sources are rows of `[n_docs * W]`.
        final_shape: `(D, W)`.
    """

    heads: Places
    head_tokens: tuple[int, ...]
    head_counts: tuple[int, ...]
    final_tokens: Places
    final_states: Places
    final_shape: tuple[int, int]

    @classmethod
    def of(cls, layout: SequenceLayout, W: int) -> "Borders":
        heads, head_tokens, head_counts = [], [], [0]
        tokens, states = [], []
        for document, (start, length) in enumerate(
            zip(layout.offsets[:-1], layout.lengths, strict=True)
        ):
            count = min(length, W - 1)
            heads += zip(
                range(document * (W - 1), (document + 1) * (W - 1)),
                range(start, start + count),
                strict=False,
            )
            head_tokens += range(start, start + count)
            head_counts.append(len(heads))
            for k in range(W):
                position = length - W + k
                if position >= 0:
                    tokens.append((document * W + k, start + position))
                else:
                    states.append((document * W + k, document * W + W + position))
        return cls(
            _places(heads, layout.device),
            tuple(head_tokens),
            tuple(head_counts),
            _places(tokens, layout.device),
            _places(states, layout.device),
            (len(layout.lengths), W),
        )

    def heads_of_documents(self, first: int, last: int, W: int) -> Places:
        """The heads of these documents, as a table of their own."""
        some = slice(self.head_counts[first], self.head_counts[last])
        return Places(self.heads.places[some] - first * (W - 1), self.heads.sources[some])

    def heads_among_tokens(self, start: int, end: int) -> Tensor:
        """The tokens of `[start, end)` that are in a head, counted from `start`."""
        some = slice(bisect_left(self.head_tokens, start), bisect_left(self.head_tokens, end))
        return self.heads.sources[some] - start


def _places(pairs: list[tuple[int, int]], device: torch.device) -> Places:
    table = torch.tensor(pairs, dtype=torch.int64, device="cpu").reshape(-1, 2)
    places, sources = table.unbind(1)
    return Places(places.contiguous().to(device), sources.contiguous().to(device))
