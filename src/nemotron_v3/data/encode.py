"""From records to token ids, with which of them are targets of the loss.

A token that is no target is held as its bitwise complement (`~id`, which is negative), so that a
document and its targets are one list of numbers.
"""

import hashlib
import json
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from itertools import groupby
from pathlib import Path
from typing import Any, Protocol, Self

import tokenizers

from nemotron_v3.chat import ChatTemplate
from nemotron_v3.chat.template import read_special_tokens
from nemotron_v3.config.files import read_text
from nemotron_v3.config.text import check_text
from nemotron_v3.data.options import TrainOn
from nemotron_v3.data.read import Record, column_of

BATCH = 256


class DataTokenizer(Protocol):
    """What is needed of a tokenizer: `Tokenizer` and `PretrainedTokenizer` have it."""

    @property
    def backend(self) -> tokenizers.Tokenizer: ...

    @property
    def special_tokens(self) -> Mapping[str, str]: ...

    def frame(self) -> tuple[list[int], list[int]]: ...


@dataclass
class Documents:
    """What a unit's records became.

    Attributes:
        ids: of each document, complements where a token is no target.
        sizes: bytes of the text of each document, of a chat's that its targets stand for.
        bad: lines that are none, each with why; counted from 1 in the unit.
        lines: read, blank ones included.
        empty: documents without text.
        without_targets: documents of which no token is a target.
    """

    ids: list[list[int]] = field(default_factory=list)
    sizes: list[int] = field(default_factory=list)
    bad: list[tuple[int, str]] = field(default_factory=list)
    lines: int = 0
    empty: int = 0
    without_targets: int = 0


@dataclass(frozen=True)
class Encoder:
    """Turns text and chats into token ids; travels to other processes.

    Attributes:
        backend: the tokeniser.
        literal: whether a special token's spelling in a text is text like any other; in a chat it
            is that token, since the template writes it.
        before, behind: token ids around each document that is no chat.
        template: for chats, or None.
        train_on: which tokens of chats are targets.
    """

    backend: tokenizers.Tokenizer
    literal: bool
    before: tuple[int, ...]
    behind: tuple[int, ...]
    template: ChatTemplate | None
    train_on: TrainOn

    @classmethod
    def of(
        cls,
        tokenizer: DataTokenizer,
        chat_template: str | None = None,
        train_on: TrainOn = "assistant",
    ) -> Self:
        """With a template by its folder, its file or itself, and the tokenizer's special tokens in
        it, whatever the folder that it lies in calls them.

        Raises:
            TypeError: no such tokenizer.
            ValueError: no template.
        """
        if not callable(getattr(tokenizer, "frame", None)):
            raise TypeError(
                f"the tokenizer is a {type(tokenizer).__name__}: give what "
                "PretrainedTokenizer.load or Tokenizer.load reads from a folder"
            )
        before, behind = tokenizer.frame()
        template = None
        if chat_template is not None:
            template = read_template(chat_template, tokenizer.special_tokens)
        return cls(
            tokenizer.backend,
            tokenizer.backend.encode_special_tokens,
            tuple(before),
            tuple(behind),
            template,
            train_on,
        )

    def __setstate__(self, state: dict[str, Any]) -> None:
        self.__dict__.update(state)
        # A setting that the tokeniser leaves behind when it travels.
        self.backend.encode_special_tokens = self.literal

    def fingerprint(self) -> str:
        """The same for encoders that give the same ids."""
        told = [
            self.backend.to_str(),
            self.literal,
            self.before,
            self.behind,
            None if self.template is None else self.template.fingerprint(),
            self.train_on,
        ]
        return hashlib.sha256(json.dumps(told).encode()).hexdigest()

    def part(self, text: str, is_first: bool, is_last: bool) -> list[int]:
        """The ids of a part of a document, with what stands around it at its ends."""
        ids = self.backend.encode(text, add_special_tokens=False).ids
        return [*(self.before if is_first else ()), *ids, *(self.behind if is_last else ())]

    def documents(self, records: Iterator[Record], field: str) -> Documents:
        """The documents of a unit's records.

        Raises:
            ValueError: chats without a template, or with one that marks no assistant's words where
                they alone are targets.
        """
        done = Documents()
        read: list[_Text] = []
        for record in records:
            done.lines = record.line
            if record.value is None:
                if record.why:
                    done.bad.append((record.line, record.why))
                continue
            try:
                value = _document(record.value, field)
                if isinstance(value, list):
                    read.append(self._render(self._checked_template(), value, record.value))
                else:
                    read.append(_Text(value))
            except _BadRecord as error:
                done.bad.append((record.line, str(error)))
        for text, ids in zip(read, self._encode(read), strict=True):
            if len(ids) < 2:
                done.empty += 1
            elif all(number < 0 for number in ids[1:]):
                done.without_targets += 1
            else:
                done.ids.append(ids)
                done.sizes.append(text.size)
        return done

    def _checked_template(self) -> ChatTemplate:
        if self.template is None:
            raise ValueError(
                "it holds chats (messages), and there is no chat template: put one into the "
                "checkpoint's folder (chat_template.jinja), or give it (train --data.chat-template "
                "FILE, eval --chat-template FILE, in Python chat_template), with {% generation %} "
                "and {% endgeneration %} around what the assistant writes"
            )
        if self.train_on == "assistant" and not self.template.marks_assistant:
            raise ValueError(
                "the chat template marks no assistant's words, which alone are to be learnt: put "
                "{% generation %} and {% endgeneration %} around them in the template, or train "
                "on all words (train_on all)"
            )
        return self.template

    def _render(
        self, template: ChatTemplate, messages: list[Any], record: dict[str, Any]
    ) -> "_Text":
        variables = record.get("chat_template_kwargs") or {}
        if not isinstance(variables, dict):
            raise _BadRecord("chat_template_kwargs is no object")
        tools = record.get("tools") or None
        try:
            text, spans = template.render_spans(messages, tools=tools, **variables)
            check_text(text, "the chat")
        except (TypeError, ValueError) as error:
            raise _BadRecord(str(error)) from None
        return _Text(text, True, spans if self.train_on == "assistant" else None)

    def _encode(self, texts: Sequence["_Text"]) -> Iterator[list[int]]:
        """The ids of each text, none for one that is blank."""
        for start in range(0, len(texts), BATCH):
            batch = texts[start : start + BATCH]
            for text, encoding in zip(batch, self._encodings(batch), strict=True):
                if not text.text.strip():
                    yield []
                elif not text.is_chat:
                    yield [*self.before, *encoding.ids, *self.behind]
                elif text.spans is None:
                    yield encoding.ids
                else:
                    yield only_in(text.spans, encoding.ids, encoding.offsets)

    def _encodings(self, batch: Sequence["_Text"]) -> Iterator[tokenizers.Encoding]:
        # The fast one does not say which characters a token stands for.
        plain = all(text.spans is None for text in batch)
        encode = self.backend.encode_batch_fast if plain else self.backend.encode_batch
        for are_chats, group in groupby(batch, lambda text: text.is_chat):
            self.backend.encode_special_tokens = self.literal and not are_chats
            try:
                found = encode([text.text for text in group], add_special_tokens=False)
            finally:
                self.backend.encode_special_tokens = self.literal
            yield from found


@dataclass(frozen=True)
class _Text:
    """A document's text; of a chat with the places of its targets, None for all of it."""

    text: str
    is_chat: bool = False
    spans: list[tuple[int, int]] | None = None

    @property
    def size(self) -> int:
        """Bytes of the targets' text in UTF-8."""
        if self.spans is None:
            return len(self.text.encode())
        return sum(len(self.text[start:end].encode()) for start, end in self.spans)


def only_in(
    spans: Sequence[tuple[int, int]], ids: Sequence[int], offsets: Sequence[tuple[int, int]]
) -> list[int]:
    """The ids, complemented where a token has no character in one of the spans.

    Args:
        spans: stretches of characters, one behind the other.
        ids: of the text's tokens.
        offsets: the characters that each token stands for.
    """
    made = [~number for number in ids]
    place = 0
    for start, end in spans:
        while place < len(ids) and offsets[place][1] <= start:
            place += 1
        while place < len(ids) and offsets[place][0] < end:
            if offsets[place][0] < offsets[place][1]:
                made[place] = ids[place]
            place += 1
    return made


class _BadRecord(ValueError):
    """A record that is no document; only it is left out."""


def _document(record: dict[str, Any], field: str) -> str | list[Any]:
    """A record's text or messages."""
    key = column_of(list(record), field)
    if key is None:
        raise _BadRecord(f"no field {field!r}: there are {', '.join(map(repr, record)) or 'none'}")
    value = record[key]
    if isinstance(value, str):
        try:
            check_text(value, f"the field {key!r}")
        except ValueError as error:
            raise _BadRecord(str(error)) from None
        return value
    if isinstance(value, list):
        if not value:
            raise _BadRecord(f"the field {key!r} is an empty list of messages")
        if not any(isinstance(message, dict) for message in value):
            raise _BadRecord(f"the field {key!r} is {value!r:.60}: a list, and not of messages")
        return value
    raise _BadRecord(f"the field {key!r} is {value!r:.60}: neither text nor a list of messages")


def read_template(told: str, special_tokens: Mapping[str, str]) -> ChatTemplate:
    """A template by its folder, its file or itself.

    Args:
        told: the path, or the template.
        special_tokens: the tokenizer's, which count over those that the folder names.

    Raises:
        ValueError: there is none.
    """
    if "{%" in told or "{{" in told:
        return ChatTemplate(told, special_tokens)
    path = Path(told)
    if path.is_dir():
        return ChatTemplate.load(path).with_special_tokens(special_tokens)
    if not path.exists():
        raise ValueError(
            f"chat_template is {told!r}: give a template's file, a folder that has one, or its text"
        )
    return ChatTemplate(read_text(path), read_special_tokens(path.parent) | dict(special_tokens))
