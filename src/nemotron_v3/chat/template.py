"""Chat templates: from messages to one text, in the dialect that checkpoints carry."""

import hashlib
import json
import re
import secrets
from collections.abc import Mapping, Sequence
from os import PathLike
from pathlib import Path
from typing import Any, Self

from nemotron_v3.chat import renderer
from nemotron_v3.chat.messages import leave_open, plain, plain_messages
from nemotron_v3.chat.tools import schemas
from nemotron_v3.config.files import exists, read_object, read_text

TEMPLATE_FILE = "chat_template.jinja"
MORE_TEMPLATES = "additional_chat_templates"
TOKENIZER_CONFIG_FILE = "tokenizer_config.json"
SPECIAL_TOKENS_FILE = "special_tokens_map.json"
DEFAULT, WITH_TOOLS = "default", "tool_use"

MAX_TEMPLATE_BYTES = 2**20
MAX_JSON_BYTES = 2**24
_GENERATION = re.compile(r"\{%[-+]?\s*generation\b")


class ChatTemplate:
    """A chat template, or several by name, rendered as transformers renders them.

    A template is a program from whoever made the checkpoint. It can read what it is given and
    nothing else, and change nothing, and it is rendered in a process of its own with bounds on
    computing time (5 seconds), memory (1 GiB) and text (67 million characters).

    Args:
        source: the template; or templates by name, of which `tool_use` is taken where there are
            tools, and else `default`.
        special_tokens: texts it may ask for by name, such as `bos_token`.
        name: which of several templates to take instead.

    Raises:
        ValueError: what is no template; no template of that name.
    """

    def __init__(
        self,
        source: str | Mapping[str, str],
        special_tokens: Mapping[str, str] | None = None,
        name: str | None = None,
    ):
        self._sources = {DEFAULT: source} if isinstance(source, str) else dict(source)
        self._special_tokens = dict(special_tokens or {})
        if name is not None:
            if name not in self._sources:
                raise ValueError(f"no chat template {name!r}: there are {self._names()}")
            self._sources = {DEFAULT: self._sources[name]}
        for each in self._sources.values():
            if not isinstance(each, str):
                raise TypeError(f"a chat template is a text, got a {type(each).__name__}")
            reply = renderer.ask(each, None)
            if "error" in reply:
                raise ValueError(f"this is no chat template: {reply['error']}")

    @classmethod
    def load(cls, folder: str | PathLike[str], name: str | None = None) -> Self:
        """The template of a checkpoint: `chat_template.jinja`, with those that are called
        `additional_chat_templates/NAME.jinja`; else `tokenizer_config.json`'s.

        Raises:
            ValueError: the folder has none, or a file of it cannot be read.
        """
        folder = Path(folder)
        about = _object(folder / TOKENIZER_CONFIG_FILE)
        sources = _files(folder) or _named(folder, about.get("chat_template"))
        if not sources:
            raise ValueError(
                f"{folder} has no chat template ({TEMPLATE_FILE}, or chat_template in "
                f"{TOKENIZER_CONFIG_FILE}): it is no chat model; give a prompt instead"
            )
        return cls(sources, read_special_tokens(folder), name)

    def with_special_tokens(self, special_tokens: Mapping[str, str]) -> Self:
        """The same with these special tokens in the place of those of the same names."""
        return type(self)(self._sources, self._special_tokens | dict(special_tokens))

    def files(self) -> dict[str, bytes]:
        """The files that `load` reads it from, by their names in a checkpoint's folder."""
        names = {n: f"{MORE_TEMPLATES}/{n}.jinja" for n in self._sources} | {DEFAULT: TEMPLATE_FILE}
        return {names[name]: source.encode() for name, source in self._sources.items()}

    @property
    def marks_assistant(self) -> bool:
        """Whether it has a `generation` tag, around what the assistant wrote."""
        return any(_GENERATION.search(source) for source in self._sources.values())

    def fingerprint(self) -> str:
        """The same for templates that render alike: a hash of their sources and special tokens."""
        identity = json.dumps([self._sources, self._special_tokens], sort_keys=True)
        return hashlib.sha256(identity.encode("utf-8", "surrogatepass")).hexdigest()

    def render(
        self,
        messages: Sequence[Any],
        *,
        tools: Sequence[Any] | None = None,
        documents: Sequence[Mapping[str, Any]] | None = None,
        add_generation_prompt: bool | None = None,
        continue_final_message: bool | str = False,
        **variables: Any,
    ) -> str:
        """The messages as one text.

        Args:
            messages: dicts (`{"role": ..., "content": ...}`), data classes or pydantic models. A
                key whose value is None counts as not there.
            tools: what the model may call: JSON schemas, or functions with annotations and a
                docstring, of which a schema is made.
            documents: dicts with a title and a text, for templates that know them.
            add_generation_prompt: end with what opens the assistant's answer; by default it does,
                unless the last message is continued.
            continue_final_message: end within the last message, so that it is gone on with; a
                text names the field of it that is left open, in place of `content`.
            **variables: what else the template understands, such as `enable_thinking`.

        Raises:
            ValueError: messages that the template refuses, in its words; tools or documents that
                are no list; a template at fault: an
                error in it, too much time, memory or text.
            TypeError: a message that is no dict, data class or model; a tool without a schema.
        """
        variables = self._variables(tools, documents, variables)
        if not continue_final_message:
            variables["add_generation_prompt"] = add_generation_prompt in (None, True)
            return self._ask(plain_messages(messages), tools, variables)["text"]
        if add_generation_prompt:
            raise ValueError(
                "add_generation_prompt opens a new answer, and continue_final_message goes on "
                "with the last message: choose one"
            )
        variables["add_generation_prompt"] = False
        return self._left_open(plain_messages(messages), continue_final_message, tools, variables)

    def render_spans(
        self,
        messages: Sequence[Any],
        *,
        tools: Sequence[Any] | None = None,
        documents: Sequence[Mapping[str, Any]] | None = None,
        add_generation_prompt: bool = False,
        **variables: Any,
    ) -> tuple[str, list[tuple[int, int]]]:
        """The messages as one text, and where in it the assistant's own words stand.

        Arguments and errors are `render`'s. Each place `(start, end)` counts characters and is what
        the template put into a `generation` tag; a template without that tag gives none.
        """
        variables = self._variables(tools, documents, variables)
        variables["add_generation_prompt"] = add_generation_prompt
        reply = self._ask(plain_messages(messages), tools, variables, spans=True)
        return reply["text"], [(start, end) for start, end in reply["spans"]]

    def _variables(
        self,
        tools: Sequence[Any] | None,
        documents: Sequence[Mapping[str, Any]] | None,
        variables: Mapping[str, Any],
    ) -> dict[str, Any]:
        for name, value in (("tools", tools), ("documents", documents)):
            if isinstance(value, str | Mapping) or not isinstance(value, Sequence | None):
                raise ValueError(f"{name} is {value!r}: give a list")
        given = {
            "tools": schemas(tools),
            "documents": None if documents is None else list(documents),
        }
        return self._special_tokens | plain({**variables, **given})

    def _source(self, tools: Any) -> str:
        name = WITH_TOOLS if tools is not None and WITH_TOOLS in self._sources else DEFAULT
        if name not in self._sources:
            raise ValueError(
                f"the checkpoint has chat templates {self._names()} and none called {DEFAULT}: "
                "give the name of one"
            )
        return self._sources[name]

    def _names(self) -> str:
        return ", ".join(sorted(self._sources))

    def _ask(
        self, messages: Any, tools: Any, variables: dict[str, Any], spans: bool = False
    ) -> dict[str, Any]:
        reply = renderer.ask(self._source(tools), {**variables, "messages": messages}, spans)
        if "error" not in reply:
            return reply
        if reply["kind"] == "refused":
            words = f": {reply['error']}" if reply["error"] else ""
            raise ValueError(f"the chat template refuses the messages{words}")
        line = "" if reply["line"] is None else f" in line {reply['line']}"
        raise ValueError(f"the chat template is at fault{line}: {reply['error']}")

    def _left_open(
        self, messages: list[Any], field: bool | str, tools: Any, variables: dict[str, Any]
    ) -> str:
        """The text up to the end of the last message's own words."""
        field = field if isinstance(field, str) else "content"
        mark = f"\ue002{secrets.token_hex(8)}"
        text = leave_open(messages, field, f"{mark} ")
        rendered = self._ask(messages, tools, variables)["text"]
        before, found, behind = rendered.rpartition(mark)
        if not found or text.strip() not in rendered:
            raise ValueError(
                f"the chat template does not write the last message's {field} as it is, so that "
                "it cannot be continued"
            )
        # A template that trims messages took the blank behind the mark, and would have taken those
        # before it.
        return before if behind.startswith(" ") else before.rstrip()


def template_folder(folder: Path, adapter: Path | None = None) -> Path:
    """Where the chat template of a checkpoint with an adapter is: beside the adapter where there is
    a file of one, for what it was trained with counts; else with the checkpoint.

    Raises:
        ValueError: a file of the adapter's cannot be read.
    """
    return adapter if adapter is not None and _files(adapter) else folder


def read_special_tokens(folder: str | PathLike[str]) -> dict[str, str]:
    """The special tokens' texts by name, of a checkpoint's folder; what it does not say is absent.

    Raises:
        ValueError: a file of it cannot be read.
    """
    files = (SPECIAL_TOKENS_FILE, TOKENIZER_CONFIG_FILE)
    found: dict[str, str] = {}
    for file in files:
        found |= special_tokens(_object(Path(folder) / file))
    return found


def special_tokens(tokenizer_config: Mapping[str, Any]) -> dict[str, str]:
    """The special tokens' texts by name, as a `tokenizer_config.json` gives them."""
    found = {}
    for name, value in tokenizer_config.items():
        if name.endswith("_token"):
            text = value.get("content") if isinstance(value, dict) else value
            if isinstance(text, str):
                found[name] = text
    return found


def _object(path: Path) -> dict[str, Any]:
    return read_object(path, MAX_JSON_BYTES, wide_integers=True) if exists(path) else {}


def _files(folder: Path) -> dict[str, str]:
    paths = {DEFAULT: folder / TEMPLATE_FILE}
    if (folder / MORE_TEMPLATES).is_dir():
        paths |= {path.stem: path for path in sorted((folder / MORE_TEMPLATES).glob("*.jinja"))}
    return {
        name: read_text(path, MAX_TEMPLATE_BYTES) for name, path in paths.items() if exists(path)
    }


def _named(folder: Path, given: Any) -> dict[str, str]:
    """The templates of a `tokenizer_config.json`: one, or a list of them with names."""
    if not given:
        return {}
    if isinstance(given, str):
        return {DEFAULT: given}
    try:
        named = {each["name"]: each["template"] for each in given}
    except (KeyError, TypeError):
        named = None
    if named is None or not all(isinstance(text, str) for pair in named.items() for text in pair):
        raise ValueError(
            f"chat_template in {folder / TOKENIZER_CONFIG_FILE} is neither a text nor a list of "
            "texts with names"
        )
    return named
