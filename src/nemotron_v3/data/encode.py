"""From records to token ids, with which of them are targets of the loss.

A token that is no target is held as its bitwise complement (`~id`, which is negative), so that a
document and its targets are one list of numbers.
"""

import hashlib
import json
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any

import tokenizers

from nemotron_v3.chat import ChatTemplate
from nemotron_v3.config.text import check_text
from nemotron_v3.data.options import TrainOn
from nemotron_v3.data.read import Record, column_of

BATCH = 256


@dataclass
class Documents:
    """What a unit's records became.

    Attributes:
        ids: of each document, complements where a token is no target.
        bad: lines that are none, each with why; counted from 1 in the unit.
        lines: read, blank ones included.
        empty: documents without text.
        without_targets: documents of which no token is a target.
    """

    ids: list[list[int]] = field(default_factory=list)
    bad: list[tuple[int, str]] = field(default_factory=list)
    lines: int = 0
    empty: int = 0
    without_targets: int = 0


@dataclass(frozen=True)
class Encoder:
    """Turns text and chats into token ids; travels to other processes.

    Attributes:
        backend: the tokeniser.
        literal: whether a special token's spelling in a text is text like any other.
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
        texts: list[tuple[int, str]] = []
        chats: list[tuple[int, str, list[tuple[int, int]] | None]] = []
        order: list[tuple[bool, int]] = []
        for record in records:
            done.lines = record.line
            if record.value is None:
                if record.why:
                    done.bad.append((record.line, record.why))
                continue
            try:
                value = _document(record.value, field)
                if isinstance(value, list):
                    self._check_template()
                    order.append((True, len(chats)))
                    chats.append((record.line, *self._render(value, record.value)))
                else:
                    order.append((False, len(texts)))
                    texts.append((record.line, value))
            except _BadRecord as error:
                done.bad.append((record.line, str(error)))
        made = (self._encode_texts(texts), self._encode_chats(chats))
        for is_chat, place in order:
            ids = made[is_chat][place]
            if len(ids) < 2:
                done.empty += 1
            elif all(number < 0 for number in ids[1:]):
                done.without_targets += 1
            else:
                done.ids.append(ids)
        return done

    def _check_template(self) -> None:
        if self.template is None:
            raise ValueError("it holds chats (messages), and there is no chat_template: give one")
        if self.train_on == "assistant" and not self.template.marks_assistant:
            raise ValueError(
                "the chat template marks no assistant's words, which alone are to be learnt: put "
                "{% generation %} and {% endgeneration %} around them in the template, or train "
                "on all words (train_on all)"
            )

    def _render(
        self, messages: list[Any], record: dict[str, Any]
    ) -> tuple[str, list[tuple[int, int]] | None]:
        """The text of a chat and the places of its targets, None for all of it."""
        variables = record.get("chat_template_kwargs") or {}
        if not isinstance(variables, dict):
            raise _BadRecord("chat_template_kwargs is no object")
        tools = record.get("tools") or None
        try:
            text, spans = self.template.render_spans(messages, tools=tools, **variables)
            check_text(text, "the chat")
        except (TypeError, ValueError) as error:
            raise _BadRecord(str(error)) from None
        return text, spans if self.train_on == "assistant" else None

    def _encode_texts(self, texts: Sequence[tuple[int, str]]) -> list[list[int]]:
        made = []
        for batch in _batches(texts):
            found = self.backend.encode_batch_fast([t for _, t in batch], add_special_tokens=False)
            for (_, text), encoding in zip(batch, found, strict=True):
                ids = [*self.before, *encoding.ids, *self.behind]
                made.append(ids if text.strip() else [])
        return made

    def _encode_chats(
        self, chats: Sequence[tuple[int, str, list[tuple[int, int]] | None]]
    ) -> list[list[int]]:
        made = []
        for batch in _batches(chats):
            found = self.backend.encode_batch([t for _, t, _ in batch], add_special_tokens=False)
            for (_, _, spans), encoding in zip(batch, found, strict=True):
                ids = encoding.ids
                made.append(ids if spans is None else only_in(spans, ids, encoding.offsets))
        return made


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
        return value
    raise _BadRecord(f"the field {key!r} is {value!r:.60}: neither text nor a list of messages")


def _batches(items: Sequence[Any]) -> Iterator[Sequence[Any]]:
    return (items[start : start + BATCH] for start in range(0, len(items), BATCH))
