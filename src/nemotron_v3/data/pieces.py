"""Documents to pieces, and pieces to the tensors of a row."""

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from nemotron_v3.data.store import TokenStore
from nemotron_v3.layout import SequenceLayout

IGNORE_INDEX = -100


@dataclass(frozen=True)
class PackedRow:
    """Documents one behind the other in T places, and padding behind them.

    Labels are as the model takes them: each stands at the place of its own token, and the token
    before it in its document predicts it (the model shifts). The first token of a document has no
    label, so a target never crosses a document's border, and the labels that are not -100 are
    exactly the targets.

    Attributes:
        input_ids: int64 `[T]`, on the CPU.
        labels: int64 `[T]`; -100 at what is no target.
        cu_seqlens: where each document begins, and the number of places before the padding: `[0]`
            for a row that is all padding.
        sources: of each document, the number of its source and its own number there.
    """

    input_ids: Tensor
    labels: Tensor
    cu_seqlens: list[int]
    sources: list[tuple[int, int]]

    @property
    def num_targets(self) -> int:
        return int((self.labels != IGNORE_INDEX).sum())

    @property
    def num_tokens(self) -> int:
        """Tokens without padding."""
        return self.cu_seqlens[-1]

    def layout(self, device: torch.device | str = "cpu") -> SequenceLayout:
        """How the documents lie in the row's T places."""
        size = len(self.input_ids)
        starts = self.cu_seqlens if len(self.cu_seqlens) > 1 else [0, 0]
        ends = [*starts[:-1], size]
        return SequenceLayout.from_cu_seqlens(
            torch.tensor(starts, device=device), (size,), torch.tensor(ends, device=device)
        )


class Pieces:
    """All pieces of the stores: documents, and stretches of those that are longer than a row.

    Each stretch after the first begins with the last token of the one before, so that cutting
    leaves no token unpredicted and predicts none twice. A stretch of a chat without a target is
    left out.

    Args:
        stores: of the sources, in their order.
        tokens_per_row: T.
        padding: the token id of places without a document.

    Attributes:
        lengths: int64 `[N]`, tokens of each piece.
        counts: pieces of each source.
        cut: documents of each source that are longer than a row.
        left_out: pieces of each source without a target.
    """

    def __init__(self, stores: Sequence[TokenStore], tokens_per_row: int, padding: int):
        self._stores, self._tokens_per_row, self._padding = stores, tokens_per_row, padding
        parts = [self._of(store) for store in stores]
        self.counts: list[int] = [len(lengths) for _, _, lengths, _ in parts]
        self.cut: list[int] = [int((store.lengths > tokens_per_row).sum()) for store in stores]
        self.left_out: list[int] = [left_out for _, _, _, left_out in parts]
        self._documents = torch.cat([documents for documents, _, _, _ in parts])
        self._starts = torch.cat([starts for _, starts, _, _ in parts])
        self.lengths: Tensor = torch.cat([lengths for _, _, lengths, _ in parts])
        self._ends = torch.tensor(self.counts, device="cpu").cumsum(0)

    def row(self, pieces: Sequence[int]) -> PackedRow:
        """The row of these pieces, one behind the other; of none, a row of padding."""
        numbers = torch.tensor(pieces, dtype=torch.int64, device="cpu")
        sources = torch.searchsorted(self._ends, numbers, right=True).tolist()
        documents = self._documents[numbers].tolist()
        starts, lengths = self._starts[numbers].tolist(), self.lengths[numbers].tolist()
        raw, borders = bytearray(4 * self._tokens_per_row), [0]
        view = memoryview(raw)
        for source, start, length in zip(sources, starts, lengths, strict=True):
            end = borders[-1] + length
            self._stores[source].read_into(view[4 * borders[-1] : 4 * end], start)
            borders.append(end)
        signed = torch.frombuffer(raw, dtype=torch.int32).long()
        input_ids = torch.where(signed < 0, ~signed, signed)
        labels = torch.where(signed < 0, IGNORE_INDEX, signed)
        labels[borders[:-1]] = IGNORE_INDEX
        labels[borders[-1] :] = IGNORE_INDEX
        input_ids[borders[-1] :] = self._padding
        return PackedRow(input_ids, labels, borders, list(zip(sources, documents, strict=True)))

    def _of(self, store: TokenStore) -> tuple[Tensor, Tensor, Tensor, int]:
        """Document, start and length of each piece of a store; how many were left out."""
        step = self._tokens_per_row - 1
        per_document = (store.lengths - 1 + step - 1) // step
        documents = torch.repeat_interleave(per_document)
        first = per_document.cumsum(0) - per_document
        offsets = (torch.arange(len(documents), device="cpu") - first[documents]) * step
        lengths = (store.lengths[documents] - offsets).clamp(max=self._tokens_per_row)
        starts = store.starts[documents] + offsets
        if store.about.targets == store.about.tokens:
            return documents, starts, lengths, 0
        kept = torch.ones(len(documents), dtype=torch.bool, device="cpu")
        # A document that was not cut has a target, else it would not be in the store.
        for i in (per_document[documents] > 1).nonzero().flatten().tolist():
            tokens = store.read(int(starts[i]), int(lengths[i]))
            kept[i] = bool((tokens[1:] >= 0).any())
        left_out = len(kept) - int(kept.sum())
        return documents[kept], starts[kept], lengths[kept], left_out
