"""What becomes of one unit: the work of a worker, which starts without torch."""

from array import array
from collections.abc import Sequence
from dataclasses import dataclass, field

from nemotron_v3.data.encode import Encoder
from nemotron_v3.data.read import Unit, read_records, read_text_part


@dataclass(frozen=True)
class Tokenized:
    """What a unit became; of a text file, one part of its document.

    `lengths` count a document's tokens, `sizes` the bytes of the text that its targets stand for.
    """

    ids: bytes
    lengths: list[int]
    sizes: list[int] = field(default_factory=list)
    bad: list[tuple[int, str]] = field(default_factory=list)
    lines: int = 0
    empty: int = 0
    without_targets: int = 0
    targets: int = 0
    largest: int = -1


@dataclass(frozen=True)
class TokenizeUnit:
    """What a worker does to a unit."""

    encoder: Encoder
    field: str

    def __call__(self, unit: Unit) -> Tokenized:
        try:
            return self._text(unit) if unit.file.format == "text" else self._records(unit)
        except ValueError as error:
            raise ValueError(f"{unit.file.path}: {error}") from None
        except OSError as error:
            if error.filename is not None:
                raise
            raise OSError(f"{unit.file.path} cannot be read: {error}") from None

    def _records(self, unit: Unit) -> Tokenized:
        done = self.encoder.documents(read_records(unit, self.field), self.field)
        targets, largest = _counts(done.ids)
        return Tokenized(
            _packed(done.ids),
            [len(ids) for ids in done.ids],
            done.sizes,
            done.bad,
            done.lines,
            done.empty,
            done.without_targets,
            targets,
            largest,
        )

    def _text(self, unit: Unit) -> Tokenized:
        try:
            text = read_text_part(unit)
        except ValueError as error:
            return Tokenized(b"", [], bad=[(0, str(error))])
        is_first, is_last = unit.start == 0, unit.end == unit.file.size
        if is_first and is_last and not text.strip():
            return Tokenized(b"", [])
        ids = self.encoder.part(text, is_first, is_last)
        targets, largest = _counts([ids])
        size = len(text.encode())
        return Tokenized(_packed([ids]), [len(ids)], [size], targets=targets, largest=largest)


def _counts(documents: list[list[int]]) -> tuple[int, int]:
    """The number of targets, and the largest id."""
    targets, largest = 0, -1
    for ids in filter(None, documents):
        least = min(ids)
        targets += len(ids) if least >= 0 else sum(number >= 0 for number in ids)
        largest = max(largest, max(ids), ~least)
    return targets, largest


def _packed(documents: Sequence[Sequence[int]]) -> bytes:
    """Documents' numbers as int32, one behind the other."""
    numbers = array("i")
    for ids in documents:
        numbers.extend(ids)
    return numbers.tobytes()
