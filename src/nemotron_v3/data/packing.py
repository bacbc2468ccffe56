"""Documents of token ids to packs: documents one after the other, without padding.

A token is predicted from the tokens before it in its piece of a document. Where a document is cut,
the next piece begins with the last token of the one before, so that cutting leaves no token
unpredicted and predicts none twice.
"""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from nemotron_v3.layout import SequenceLayout


@dataclass(frozen=True)
class Pack:
    """`input_ids`, int64 `[T]`, and how the documents lie in them."""

    input_ids: Tensor
    layout: SequenceLayout

    @property
    def num_targets(self) -> int:
        """The tokens that are predicted: all but the first of each document."""
        return sum(max(length - 1, 0) for length in self.layout.lengths)


def pack_whole(documents: Sequence[Sequence[int]], tokens: int) -> Iterator[Pack]:
    """Whole documents in the order given, in packs of at most `tokens` tokens; a document longer
    than that is a pack of its own. For measuring: no document loses its context."""
    pack: list[Sequence[int]] = []
    size = 0
    for document in documents:
        if pack and size + len(document) > tokens:
            yield _pack(pack)
            pack, size = [], 0
        pack.append(document)
        size += len(document)
    if pack:
        yield _pack(pack)


def training_packs(
    documents: Sequence[Sequence[int]], tokens: int, max_length: int, seed: int
) -> Iterator[Pack]:
    """Packs of exactly `tokens` tokens without end, one pass over the documents after another.

    Documents are cut into pieces of at most `max_length` tokens, and each pass takes the pieces in
    an order of its own, so that a long document does not fill several packs in a row. The piece
    that meets a pack's end goes on in the next pack. The same arguments give the same packs.

    Raises:
        ValueError: no document with two tokens, or sizes that leave nothing to predict.
    """
    if max_length < 2 or tokens < 2:
        raise ValueError(
            f"packs of {tokens} tokens from pieces of {max_length} predict nothing: both must be "
            "at least 2"
        )
    pieces = [piece for document in documents for piece in cut(document, max_length)]
    if not pieces:
        raise ValueError(
            f"none of the {len(documents)} documents has two tokens: there is nothing to predict"
        )
    generator = torch.Generator("cpu").manual_seed(seed)
    pack: list[Sequence[int]] = []
    room = tokens
    while True:
        for i in torch.randperm(len(pieces), generator=generator).tolist():
            piece = pieces[i]
            while len(piece) > 1:
                # A single place left takes the first token alone, which predicts nothing and is
                # placed again in the next pack.
                pack.append(piece[:room])
                placed = len(pack[-1])
                room -= placed
                piece = piece[placed - 1 :]
                if room == 0:
                    yield _pack(pack)
                    pack, room = [], tokens


def cut(document: Sequence[int], max_length: int) -> Iterator[Sequence[int]]:
    """Pieces of 2 to `max_length` tokens, each after the first beginning with the last token of
    the one before; a document of one token gives none."""
    for start in range(0, len(document) - 1, max_length - 1):
        yield document[start : start + max_length]


def _pack(pieces: Sequence[Sequence[int]]) -> Pack:
    ids = torch.tensor(
        [token for piece in pieces for token in piece], dtype=torch.int64, device="cpu"
    )
    return Pack(ids, SequenceLayout.from_lengths([len(piece) for piece in pieces]))
