"""What an answer says: its thoughts, its text, and its tool calls."""

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from nemotron_v3.chat.messages import Message, plain
from nemotron_v3.chat.tools import schemas

THINK, THOUGHT = "<think>", "</think>"
CALL, CALLED = "<tool_call>", "</tool_call>"
# Nemotron-Nano-v2 writes a JSON list of calls.
CALLS = ("<TOOLCALL>", "</TOOLCALL>")
MARKUP = (THINK, THOUGHT, CALL, CALLED, *CALLS)
"""What a decoder must not leave out of an answer's text, be it special tokens or not."""


@dataclass(frozen=True)
class Answer:
    """An answer, taken apart.

    Attributes:
        text: all of it, as it was written.
        content: what is left for the reader.
        reasoning: what was thought before; None where the answer has no thought.
        tool_calls: `{"type": "function", "function": {"name": ..., "arguments": {...}}}` each.
            A call that is not written as it should be stays in `content`.
    """

    text: str
    content: str
    reasoning: str | None = None
    tool_calls: tuple[dict[str, Any], ...] = ()

    @property
    def message(self) -> Message:
        """The answer as a message of the conversation."""
        message: Message = {"role": "assistant", "content": self.content}
        if self.reasoning is not None:
            message["reasoning_content"] = self.reasoning
        if self.tool_calls:
            message["tool_calls"] = list(self.tool_calls)
        return message


def is_thinking(prompt: str) -> bool:
    """Whether a prompt ends within a thought that the answer is to go on with."""
    _, opened, behind = prompt.rpartition(THINK)
    return bool(opened) and not behind.strip()


def parse_answer(text: str, thinking: bool = False, tools: Sequence[Any] | None = None) -> Answer:
    """Take an answer apart.

    Args:
        text: the answer.
        thinking: whether the prompt has opened a thought (`is_thinking`).
        tools: what may be called: JSON schemas or functions. An argument that one of them
            says is no text is read as JSON; any other stays a text.
    """
    reasoning, rest = _thought(text, thinking)
    content, calls = _calls(rest, _parameters(tools))
    if rest != text or calls:  # line breaks around tags are the tags'
        content = content.strip("\n")
    return Answer(text, content, reasoning, tuple(calls))


def _thought(text: str, thinking: bool) -> tuple[str | None, str]:
    """The thought (None if there is none), and the rest of the text."""
    if not thinking:
        if not text.lstrip().startswith(THINK):
            return None, text
        text = text.lstrip()[len(THINK) :]
    thought, closed, rest = text.partition(THOUGHT)
    if not closed:
        # A call is no thought, even where the thought before it was not closed.
        at = min((at for mark in (CALL, CALLS[0]) if (at := text.find(mark)) >= 0), default=None)
        thought, rest = (text, "") if at is None else (text[:at], text[at:])
    thought = thought.strip("\n")
    return thought or None, rest


def _calls(text: str, parameters: Mapping[str, Any]) -> tuple[str, list[dict[str, Any]]]:
    """The text without its calls, and the calls in order."""
    kept, calls, at = [], [], 0
    while True:
        found = [(text.find(begin, at), begin, end) for begin, end in ((CALL, CALLED), CALLS)]
        found = [each for each in found if each[0] >= 0]
        if not found:
            return "".join([*kept, text[at:]]), calls
        start, begin, end = min(found)
        stop = text.find(end, start)
        if stop < 0:
            return "".join([*kept, text[at:]]), calls
        read = _read_calls(text[start + len(begin) : stop].strip(), parameters)
        stop += len(end)
        kept.append(text[at:stop] if read is None else text[at:start].rstrip("\n"))
        calls += read or []
        at = stop


def _read_calls(body: str, parameters: Mapping[str, Any]) -> list[dict[str, Any]] | None:
    """The calls in the text between two tags; None where it does not read as calls."""
    if body.startswith("<function="):
        call = _read_function(body, parameters)
        return None if call is None else [call]
    try:
        read = json.loads(body)
    except (ValueError, RecursionError):
        return None
    calls = [_of_json(each) for each in (read if isinstance(read, list) else [read])]
    found = [call for call in calls if call is not None]
    return found if len(found) == len(calls) else None


def _of_json(call: Any) -> dict[str, Any] | None:
    if not isinstance(call, dict) or not isinstance(call.get("name"), str):
        return None
    arguments = call.get("arguments", {})
    return _call(call["name"], arguments) if isinstance(arguments, dict) else None


def _call(name: str, arguments: dict[str, Any]) -> dict[str, Any]:
    return {"type": "function", "function": {"name": name, "arguments": arguments}}


def _read_function(body: str, parameters: Mapping[str, Any]) -> dict[str, Any] | None:
    """A call written as `<function=name>`, with a `<parameter=name>` for each argument."""
    head, opened, inside = body.removeprefix("<function=").partition(">")
    if not opened or not body.endswith("</function>") or not (name := head.strip()):
        return None
    inside = inside.removesuffix("</function>").strip()
    arguments: dict[str, Any] = {}
    while inside:
        if not inside.startswith("<parameter="):
            return None
        key, opened, inside = inside.removeprefix("<parameter=").partition(">")
        value, closed, inside = inside.partition("</parameter>")
        key = key.strip()
        if not opened or not closed or not key or key in arguments:
            return None
        value = value.removeprefix("\n").removesuffix("\n")
        arguments[key] = _value(value, parameters.get(name, {}).get(key))
        inside = inside.lstrip()
    return _call(name, arguments)


def _value(text: str, schema: Any) -> Any:
    """Parse an argument's text by its schema; without one it stays a text."""
    kinds = schema.get("type") if isinstance(schema, dict) else None
    if kinds is None or kinds == "string" or (isinstance(kinds, list) and "string" in kinds):
        return text
    try:
        return json.loads(text)
    except (ValueError, RecursionError):
        return text


def _parameters(tools: Sequence[Any] | None) -> dict[str, dict[str, Any]]:
    """The schemas of the arguments of each tool, by name."""
    found = {}
    for tool in plain(schemas(tools) or []):
        tool = tool.get("function", tool) if isinstance(tool, dict) else {}
        described = tool.get("parameters") if isinstance(tool, dict) else None
        properties = described.get("properties") if isinstance(described, dict) else None
        if isinstance(properties, dict) and isinstance(tool.get("name"), str):
            found[tool["name"]] = properties
    return found
