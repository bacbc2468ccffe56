"""Messages and variables as a chat template gets them: plain data alone."""

import dataclasses
import sys
from collections.abc import Mapping, Sequence
from typing import Any

Message = dict[str, Any]

THOUGHTS = ("reasoning_content", "thinking", "reasoning")
"""Names under which a message holds what was thought before it; templates read the first."""
DEEPEST = 100


def plain(value: Any, depth: int = 0) -> Any:
    """A copy of `value` in numbers, texts, lists, tuples and dicts.

    Data classes and pydantic models become dicts. Of anything else, such as an image or a tensor,
    `<its type>` is left: a template looks whether it is there, and has no use for its methods.

    Raises:
        ValueError: nested deeper than any template looks, as where a list holds itself.
    """
    if depth > DEEPEST:
        raise ValueError(f"a message or variable is nested more than {DEEPEST} deep")
    if value is None or isinstance(value, bool):
        return value
    for kind in (str, int, float):
        if isinstance(value, kind):
            # Not `str(value)`, which asks a subclass (an enumeration) how it would be written.
            return value if type(value) is kind else getattr(kind, f"__{kind.__name__}__")(value)
    if isinstance(value, Mapping):
        return {plain(key, depth + 1): plain(item, depth + 1) for key, item in value.items()}
    if isinstance(value, list):
        return [plain(item, depth + 1) for item in value]
    if isinstance(value, tuple):
        return tuple(plain(item, depth + 1) for item in value)
    numpy = sys.modules.get("numpy")
    if numpy is not None and isinstance(value, numpy.generic):
        return plain(value.item(), depth + 1)
    if dataclasses.is_dataclass(value) and not isinstance(value, type):
        names = [field.name for field in dataclasses.fields(value)]
        return {name: plain(getattr(value, name), depth + 1) for name in names}
    if callable(dump := getattr(value, "model_dump", None)):
        return plain(dump(), depth + 1)
    return f"<{type(value).__name__}>"


def plain_messages(messages: Sequence[Any]) -> list[Message]:
    """Copies of messages as templates expect them.

    What is None is left out, as templates ask whether a key is there. What was thought stands under
    the name that templates read, whatever name it came under.

    Raises:
        TypeError: a message that is no mapping, data class or model.
        ValueError: see `plain`.
    """
    if isinstance(messages, str | Mapping):
        raise TypeError(f"messages is a {type(messages).__name__}: give a list of messages")
    return [_message(number, plain(message)) for number, message in enumerate(messages)]


def _message(number: int, message: Any) -> Message:
    if not isinstance(message, dict):
        raise TypeError(f"message {number} is {message!r}: give a dict with a role and a content")
    message = {key: value for key, value in message.items() if value is not None}
    thought = next((message[name] for name in THOUGHTS if name in message), None)
    if thought is None:
        return message
    return {"thinking": thought} | message | {THOUGHTS[0]: thought}


def leave_open(messages: list[Message], field: str, mark: str) -> str:
    """Append `mark` to the last message's text, in place; returns the text before.

    Raises:
        ValueError: there is no such text.
    """
    if not messages or (text := messages[-1].get(field)) is None:
        raise ValueError(f"there is no last message whose {field} could be continued")
    message = messages[-1]
    if isinstance(text, list):
        block = next((b for b in reversed(text) if isinstance(b, dict) and "text" in b), None)
        if block is None:
            raise ValueError(f"the last message's {field} holds no text that could be continued")
        text = block["text"]
        block["text"] = text + mark
        return text
    if not isinstance(text, str):
        raise ValueError(f"the last message's {field} is no text that could be continued")
    # A thought has several names, and each template reads one of them.
    names = [n for n in THOUGHTS if message.get(n) == text] if field in THOUGHTS else [field]
    for name in names:
        message[name] = text + mark
    return text
