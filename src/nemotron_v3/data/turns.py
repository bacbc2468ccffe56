"""Whether chats teach a model to end its answers: looked at in the first chat there is."""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

from nemotron_v3.data.encode import Encoder
from nemotron_v3.data.find import find_files
from nemotron_v3.data.options import Source
from nemotron_v3.data.read import Record, column_of, read_records, units_of

LOOKED_AT = 20
"""Records of a source that are searched for a chat with an answer."""


@dataclass(frozen=True)
class Kinds:
    """What sources hold, as far as their first records tell.

    Attributes:
        texts: whether there is a text that is no chat.
        chat: a record with messages, an assistant's among them, and the field that they are in.
    """

    texts: bool
    chat: tuple[dict[str, Any], str] | None


def kinds_in(sources: Sequence[Source]) -> Kinds:
    """What the sources hold; what cannot be read holds nothing here, and the data says why."""
    texts, chat = False, None
    for source in sources:
        for value in _first_values(source):
            key = None if value is None else column_of(list(value), source.field)
            found = None if value is None or key is None else value[key]
            texts = texts or value is None or isinstance(found, str)
            if chat is None and value is not None and _has_answer(found):
                chat = value, source.field
    return Kinds(texts, chat)


def _first_values(source: Source) -> Iterator[dict[str, Any] | None]:
    """Its first records, None for a text file."""
    if source.format == "datasets":  # opening it may fetch it
        return
    try:
        file = find_files(source).files[0]
        if file.format == "text":
            yield None
            return
        units = units_of(file, source.field)
        for count, record in enumerate(read_records(units[0], source.field) if units else ()):
            if record.value is not None:
                yield record.value
            if count == LOOKED_AT:
                return
    except (ValueError, OSError):
        return


def _has_answer(messages: Any) -> bool:
    return isinstance(messages, list) and any(
        isinstance(m, dict) and m.get("role") == "assistant" and isinstance(m.get("content"), str)
        for m in messages
    )


def untaught_end(
    encoder: Encoder, chat: tuple[dict[str, Any], str], ends: frozenset[int]
) -> str | None:
    """Why a model that learns from chats like this one does not learn to end an answer, and the
    way out; None where it does, or where the chat is none for the encoder.

    Args:
        encoder: as the chats are encoded for training.
        chat: a record, and the field of its messages.
        ends: the tokens that end a text of the model.
    """
    record, field = chat
    try:
        (ids,) = encoder.documents(iter([Record(1, record)]), field).ids or [[]]
    except ValueError:  # no template, or none that can teach: the data says so
        return None
    if not ids or ends.intersection(number for number in ids[1:] if number >= 0):
        return None
    tail, behind = _around_the_end(encoder, record, field)
    told = ", ".join(f"{n} ({encoder.backend.id_to_token(n)!r})" for n in sorted(ends)) or "nothing"
    taught = f"the chats teach no end of an answer (the model stops at {told})"
    if not tail and ends.intersection(behind[:1]):
        return f"{taught}: put what ends it inside the template's {{% generation %}} tag"
    if not tail:
        return (
            f"{taught}: write {{{{ eos_token }}}} behind the assistant's content in the template, "
            "inside its {% generation %} tag"
        )
    tokens = _tokens(encoder, tail)
    if len(tokens) == 1:
        return (
            f"{taught}: the template ends it with {tail!r}, token {tokens[0]}: write eos_token_id "
            f"[{', '.join(map(str, sorted({*ends, *tokens})))}] into the checkpoint's "
            "generation_config.json, or of a fresh model into [model.config]"
        )
    return (
        f"{taught}: the template ends it with {tail!r}, which is no token of the tokenizer, but "
        f"{len(tokens)}: write {{{{ eos_token }}}} in its place, or give a tokenizer that has it"
    )


def _around_the_end(encoder: Encoder, record: dict[str, Any], field: str) -> tuple[str, list[int]]:
    """What the template writes behind the last answer's content within what is learnt, blanks
    apart; and the tokens behind that."""
    assert encoder.template is not None, "the chat was encoded"
    messages = record[column_of(list(record), field) or field]
    text, spans = encoder.template.render_spans(
        messages,
        tools=record.get("tools") or None,
        **(record.get("chat_template_kwargs") or {}),
    )
    if encoder.train_on == "all" or not spans:
        spans = [(0, len(text))]
    content = [m["content"] for m in messages if _has_answer([m])][-1].strip()
    start, end = spans[-1]
    place = text.rfind(content, start, end)
    tail = text[place + len(content) : end].strip() if place >= 0 else ""
    return tail, _tokens(encoder, text[end:].lstrip())


def _tokens(encoder: Encoder, text: str) -> list[int]:
    """As a template's special tokens are read."""
    literal = encoder.backend.encode_special_tokens
    encoder.backend.encode_special_tokens = False
    try:
        return encoder.backend.encode(text, add_special_tokens=False).ids
    finally:
        encoder.backend.encode_special_tokens = literal
