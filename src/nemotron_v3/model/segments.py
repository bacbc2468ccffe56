"""How the packed tokens of a batch are cut into segments in time. Nothing is read from a device."""

from dataclasses import dataclass

from torch import Tensor

from nemotron_v3.layout import SequenceLayout
from nemotron_v3.layout.modes import on_device, once


@dataclass(frozen=True)
class Segment:
    """Consecutive packed tokens, and the documents that they cut.

    Attributes:
        number: of the segment, from 0.
        start, end: of its tokens among the packed ones.
        before: how many tokens of its first document lie in earlier segments.
        leaves: whether its last document goes on in the next segment.
        layout: of its own tokens; the first and the last document may be pieces.
    """

    number: int
    start: int
    end: int
    before: int
    leaves: bool
    layout: SequenceLayout

    @property
    def tokens(self) -> slice:
        return slice(self.start, self.end)

    @property
    def entering(self) -> int:
        """How many of its tokens go on with a document of an earlier segment."""
        return self.layout.lengths[0] if self.before else 0

    @once
    def behind(self) -> SequenceLayout | None:
        """The documents that begin here; None where there are none."""
        lengths = self.layout.lengths[1:] if self.before else self.layout.lengths
        return SequenceLayout.from_lengths(lengths, self.layout.device) if lengths else None

    @once
    def held(self) -> Tensor:
        """`before`, on the device: int64 `[1]`."""
        return on_device([self.before], self.layout.device)


def cut(layout: SequenceLayout, tokens: int) -> list[Segment]:
    """Segments of so many tokens, the last one of what is left; one empty one of no tokens."""
    offsets, total = layout.offsets, layout.num_tokens
    found, document = [], 0
    for number, start in enumerate(range(0, max(1, total), tokens)):
        end = min(start + tokens, total)
        while document + 1 < layout.num_documents and offsets[document + 1] <= start:
            document += 1
        before = max(0, start - offsets[document])
        lengths, at, last = [], start, document
        while at < end:
            while offsets[last + 1] <= at:
                last += 1
            lengths.append(min(end, offsets[last + 1]) - at)
            at += lengths[-1]
        leaves = bool(lengths) and offsets[last + 1] > end
        own = SequenceLayout.from_lengths(lengths or [0], layout.device)
        found.append(Segment(number, start, end, before, leaves, own))
    return found
