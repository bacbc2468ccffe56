"""What to train on, as plain values; nothing of it is read yet."""

import math
from dataclasses import dataclass
from typing import Literal, get_args

Format = Literal["auto", "text", "jsonl", "parquet", "datasets"]
TrainOn = Literal["assistant", "all"]


@dataclass(frozen=True)
class Source:
    """Documents from one place.

    Attributes:
        path: a file, a folder (everything below it in one of the formats), a glob (`**` for any
            depth), or for `format="datasets"` a name or path that the `datasets` library knows.
        format: "auto" goes by the ending of each file: `.txt`, `.text` and `.md` are text, each
            file one document; `.jsonl` and `.ndjson` have one document a line; `.parquet` one a
            row. A folder that `datasets` saved is read with it.
        field: the key or column that holds a document's text, or a chat's list of messages. Where
            the default `text` is absent, `messages` is taken.
        weight: passes over the source in each epoch. 2.0 takes each document twice; 0.25 takes a
            quarter of them, another one in each epoch.
        split: of `datasets` alone.

    Raises:
        ValueError: a value that none can have.
    """

    path: str
    format: Format = "auto"
    field: str = "text"
    weight: float = 1.0
    split: str = "train"

    def __post_init__(self) -> None:
        if not self.path:
            raise ValueError("a source has an empty path: give a file, a folder or a glob")
        _check_choice("format", self.format, Format)
        if not self.field:
            raise ValueError(f"{self.path}: field is empty: give the key of the text")
        if not 0 < self.weight < math.inf:
            raise ValueError(f"{self.path}: weight is {self.weight}: give a positive number")


@dataclass(frozen=True)
class DataOptions:
    """How documents become the rows of training steps.

    Attributes:
        tokens_per_row: T, the places of a row; a longer document is cut.
        rows: rows of a step, over all ranks together.
        seed: of the order of the documents and rows.
        epochs: how often the sources are gone through, also a fraction; inf, kept as None, is
            without end.
        chat_template: a template's file, a folder that has one, or the template itself; needed
            where there are chats.
        train_on: in chats, whether only the assistant's own words are targets, or all tokens. Text
            that is no chat is always a target.
        workers: processes that read and tokenise; 0 does it in this one. They change no result.

    Raises:
        ValueError: a value that none can have.
    """

    sources: tuple[Source, ...]
    tokens_per_row: int
    rows: int
    seed: int = 0
    epochs: float | None = 1.0
    chat_template: str | None = None
    train_on: TrainOn = "assistant"
    workers: int = 0

    def __post_init__(self) -> None:
        if not self.sources:
            raise ValueError("there are no sources: give at least one file to train on")
        if self.tokens_per_row < 2:
            raise ValueError(
                f"tokens_per_row is {self.tokens_per_row}: a row of less than 2 tokens predicts "
                "nothing"
            )
        if self.rows < 1:
            raise ValueError(f"rows is {self.rows}: a step has at least 1")
        if self.epochs == math.inf:
            object.__setattr__(self, "epochs", None)
        if self.epochs is not None and not 0 < self.epochs < math.inf:
            raise ValueError(f"epochs is {self.epochs}: give a positive number, inf for no end")
        if self.workers < 0:
            raise ValueError(f"workers is {self.workers}: give 0 or more")
        _check_choice("train_on", self.train_on, TrainOn)


def _check_choice(name: str, value: str, choices: object) -> None:
    if value not in get_args(choices):
        raise ValueError(f"{name} is {value!r}: give one of {', '.join(get_args(choices))}")
