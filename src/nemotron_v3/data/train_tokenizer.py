"""A tokeniser of one's own from the documents that are trained on."""

from collections.abc import Iterator, Sequence
from typing import Any

from nemotron_v3.data.find import find_files
from nemotron_v3.data.options import Source
from nemotron_v3.data.read import (
    UNIT_BYTES,
    Unit,
    column_of,
    read_records,
    read_text_part,
    units_of,
)
from nemotron_v3.data.tokenizer import Tokenizer

SAMPLE_BYTES = 2**27


def train_tokenizer(
    sources: Sequence[Source], vocab_size: int, sample_bytes: int = SAMPLE_BYTES
) -> Tokenizer:
    """Learn `vocab_size` tokens from the sources; the same files give the same tokens.

    Of more than about `sample_bytes` bytes, parts are taken that are spread evenly over the files.
    Of chats it reads the messages' texts. Lines that are no documents are passed by: whoever trains
    on them counts them.

    Raises:
        ValueError: a source that cannot be read; no text at all; a vocabulary that is too small.
    """
    units = [
        (unit, source.field)
        for source in sources
        for file in find_files(source).files
        for unit in units_of(file, source.field)
    ]
    kept = max(1, min(len(units), sample_bytes // UNIT_BYTES))
    texts = _not_empty(units[i * len(units) // kept] for i in range(kept if units else 0))
    first = next(texts, None)
    if first is None:
        paths = ", ".join(source.path for source in sources)
        raise ValueError(f"{paths} hold no text to make a tokenizer of")

    def all_texts() -> Iterator[str]:
        yield first
        yield from texts

    return Tokenizer.train(all_texts(), vocab_size)


def _not_empty(units: Iterator[tuple[Unit, str]]) -> Iterator[str]:
    return (text for unit, field in units for text in _texts(unit, field) if text.strip())


def _texts(unit: Unit, field: str) -> Iterator[str]:
    if unit.file.format == "text":
        try:
            yield read_text_part(unit)
        except ValueError:
            return
    else:
        for record in read_records(unit, field):
            value = record.value or {}
            key = column_of(list(value), field)
            yield from _texts_in(value.get(key) if key is not None else None)


def _texts_in(value: Any) -> Iterator[str]:
    """A text, or those of messages; none that hold half a character."""
    if isinstance(value, str):
        if not any("\ud800" <= letter <= "\udfff" for letter in value):
            yield value
    elif isinstance(value, list):
        for message in value:
            if isinstance(message, dict):
                yield from _texts_in(message.get("content"))
