"""Writing a store from units in their order."""

import hashlib
from array import array
from collections.abc import Iterable, Sequence
from typing import BinaryIO

from nemotron_v3.data.find import File
from nemotron_v3.data.store import About, BadLine, TokenizedFile
from nemotron_v3.data.units import Tokenized

MOST_BAD = 100
"""Bad lines of a source that are borne; one more stops the run."""
SHOWN = 5


class StoreWriter:
    """Appends what units became to a store's files, and counts."""

    def __init__(self, path: str, tokens: BinaryIO, lengths: BinaryIO, sizes: BinaryIO):
        self._about = About()
        self._path, self._tokens, self._lengths, self._sizes = path, tokens, lengths, sizes

    def write(self, file: File, units: Iterable[Tokenized]) -> None:
        """Write what the units of a file became.

        Raises:
            ValueError: more than `MOST_BAD` bad lines in the source.
        """
        about = self._about
        documents, tokens = about.documents, about.tokens
        # Of what is trained on, not of the file: another tokeniser or template gives another one.
        self._digest = hashlib.blake2b(digest_size=8)
        if file.format == "text":
            self._write_text(file, units)
        else:
            self._write_records(file, units)
        about.files.append(
            TokenizedFile(
                file.name,
                about.documents - documents,
                about.tokens - tokens,
                self._digest.hexdigest(),
            )
        )

    def finish(self) -> About:
        """What was counted.

        Raises:
            ValueError: there is no document at all.
        """
        about = self._about
        if not about.documents:
            reasons = [
                (len(about.bad), "bad"),
                (about.empty, "empty"),
                (about.without_targets, "without a word of the assistant's"),
            ]
            told = ", ".join(f"{count} {what}" for count, what in reasons if count)
            raise ValueError(
                f"{self._path} holds no document to train on ({told or 'no lines'}){self._shown()}"
            )
        return about

    def _write_records(self, file: File, units: Iterable[Tokenized]) -> None:
        line = 0
        for unit in units:
            for number, why in unit.bad:
                self._note(BadLine(file.path, line + number, why))
            line += unit.lines
            self._append(unit.ids)
            self._count(unit, unit.lengths, unit.sizes)

    def _write_text(self, file: File, units: Iterable[Tokenized]) -> None:
        """A text file is one document, and none at all where a part of it is no text."""
        start, parts = self._tokens.tell(), []
        whole = Tokenized(b"", [])
        for unit in units:
            self._append(unit.ids)
            parts.append(sum(unit.lengths))
            whole = Tokenized(
                b"",
                [],
                [sum(whole.sizes) + sum(unit.sizes)],
                whole.bad + unit.bad,
                targets=whole.targets + unit.targets,
                largest=max(whole.largest, unit.largest),
            )
        if whole.bad or sum(parts) < 2:
            self._tokens.seek(start)
            self._tokens.truncate()
            self._digest = hashlib.blake2b(digest_size=8)
        if whole.bad:
            self._note(BadLine(file.path, 0, whole.bad[0][1]))
        elif sum(parts) < 2:
            self._about.empty += 1
        else:
            self._count(whole, [sum(parts)], whole.sizes)

    def _append(self, ids: bytes) -> None:
        self._tokens.write(ids)
        self._digest.update(ids)

    def _count(self, unit: Tokenized, lengths: Sequence[int], sizes: Sequence[int]) -> None:
        raw = array("q", lengths).tobytes()
        self._lengths.write(raw)
        self._sizes.write(array("q", sizes).tobytes())
        self._digest.update(raw)
        about = self._about
        about.documents += len(lengths)
        about.tokens += sum(lengths)
        about.targets += unit.targets
        about.largest = max(about.largest, unit.largest)
        about.empty += unit.empty
        about.without_targets += unit.without_targets

    def _note(self, bad: BadLine) -> None:
        self._about.bad.append(bad)
        if len(self._about.bad) > MOST_BAD:
            raise ValueError(
                f"{self._path} has more than {MOST_BAD} bad lines: mend them, or leave out what "
                f"is no document{self._shown()}"
            )

    def _shown(self) -> str:
        bad = self._about.bad
        more = [f"and {len(bad) - SHOWN} more"] if len(bad) > SHOWN else []
        return "".join(f"\n  - {line}" for line in [*bad[:SHOWN], *more])
