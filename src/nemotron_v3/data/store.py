"""The documents of one source as token ids on disk, in the order in which they were found.

`tokens.bin` holds int32 numbers, document after document: a token's id, or its complement where the
token is no target. `lengths.bin` holds an int64 a document, and so does `sizes.bin`: the bytes of
its text. `about.json` holds what was counted.
"""

import json
import os
import sys
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Self

import torch
from torch import Tensor

from nemotron_v3.config.files import read_object

TOKENS, LENGTHS, SIZES, ABOUT = "tokens.bin", "lengths.bin", "sizes.bin", "about.json"
VERSION = 4


@dataclass(frozen=True)
class BadLine:
    """A line or row that is no document; line 0 is a whole file."""

    file: str
    line: int
    why: str

    def __str__(self) -> str:
        return f"{self.file}:{self.line}: {self.why}" if self.line else f"{self.file}: {self.why}"


@dataclass(frozen=True)
class TokenizedFile:
    """A file's share of a store; `digest` is of its token ids."""

    name: str
    documents: int
    tokens: int
    digest: str


@dataclass
class About:
    """What was counted while a source was tokenised.

    Attributes:
        documents, tokens, targets: of the store; targets are tokens that count in the loss (the
            first of each document among them, which nothing predicts).
        largest: the largest token id.
        empty: documents left out since they have no text.
        without_targets: documents left out since no token of theirs is a target.
    """

    files: list[TokenizedFile] = field(default_factory=list)
    bad: list[BadLine] = field(default_factory=list)
    documents: int = 0
    tokens: int = 0
    targets: int = 0
    largest: int = -1
    empty: int = 0
    without_targets: int = 0

    def write(self, folder: Path) -> None:
        text = json.dumps({"version": VERSION, "byteorder": sys.byteorder, **asdict(self)})
        (folder / ABOUT).write_text(text + "\n", encoding="utf-8")

    @classmethod
    def read(cls, folder: Path) -> Self:
        told = read_object(folder / ABOUT, (folder / ABOUT).stat().st_size)
        if (told.pop("version"), told.pop("byteorder")) != (VERSION, sys.byteorder):
            raise ValueError(f"{folder / ABOUT} is of another version or machine")
        files = [TokenizedFile(**each) for each in told.pop("files")]
        return cls(files, [BadLine(**each) for each in told.pop("bad")], **told)


class TokenStore:
    """A store that is whole, opened to be read.

    Attributes:
        about: what was counted.
        lengths: int64 `[documents]`, on the CPU.
        starts: int64 `[documents]`, where each document begins in `tokens.bin`.
        sizes: int64 `[documents]`, bytes of the text that each document's targets stand for, in
            UTF-8; tokens that stand around a text have none.

    Raises:
        ValueError, OSError, KeyError, TypeError: no store, or one that is not whole.
    """

    def __init__(self, folder: Path):
        self.about: About = About.read(folder)
        self.lengths: Tensor = _numbers(folder / LENGTHS)
        self.sizes: Tensor = _numbers(folder / SIZES)
        self.starts: Tensor = self.lengths.cumsum(0) - self.lengths
        self._path = folder / TOKENS
        self._file = open(self._path, "rb", buffering=0)  # noqa: SIM115
        size = os.fstat(self._file.fileno()).st_size
        whole = len(self.lengths) == len(self.sizes) == self.about.documents
        whole = whole and int(self.lengths.sum()) == self.about.tokens == size // 4
        if not whole:
            self.close()
            raise ValueError(f"{folder} is damaged: its files do not fit each other")

    def read_into(self, buffer: memoryview, start: int) -> None:
        """Fill a buffer of bytes with tokens from number `start` on.

        Raises:
            OSError: the disk refuses, or the file was cut short since it was opened.
        """
        self._file.seek(4 * start)
        while len(buffer):
            count = self._file.readinto(buffer)
            if not count:
                raise OSError(f"{self._path} was cut short while it was read")
            buffer = buffer[count:]

    def read(self, start: int, count: int) -> Tensor:
        """`count` tokens from number `start` on, int32 `[count]` on the CPU."""
        raw = bytearray(4 * count)
        self.read_into(memoryview(raw), start)
        return torch.frombuffer(raw, dtype=torch.int32)

    def file_of(self, document: int) -> str:
        """The name of the file that a document comes from."""
        for file in self.about.files:
            if document < file.documents:
                return file.name
            document -= file.documents
        raise IndexError(f"there are {self.about.documents} documents")

    def close(self) -> None:
        self._file.close()


def _numbers(path: Path) -> Tensor:
    """The int64 numbers of a file; a tensor cannot be made of no bytes."""
    raw = bytearray(path.read_bytes())
    return torch.frombuffer(raw, dtype=torch.int64) if raw else torch.empty(0, dtype=torch.int64)
