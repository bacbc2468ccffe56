"""Conversations: a chat template that turns messages into a prompt, and a cache that follows."""

import json
from collections.abc import Iterator
from datetime import datetime
from os import PathLike
from pathlib import Path
from typing import Any, Self

from nemotron_v3.cache import NemotronHybridCache
from nemotron_v3.generation.engine import StreamedToken, stream
from nemotron_v3.model.model import NemotronV3ForCausalLM

TEMPLATE_FILE = "chat_template.jinja"
TOKENIZER_CONFIG_FILE = "tokenizer_config.json"

Message = dict[str, Any]


class ChatTemplate:
    """A chat template in the Jinja dialect that checkpoints carry, rendered in a sandbox.

    A template is code from whoever made the checkpoint: it can read what it is given and nothing
    else, and change nothing.

    Args:
        source: the template.
        special_tokens: texts it may ask for by name, such as `bos_token`.

    Raises:
        ValueError: what is no template, or, when it is rendered, messages that it refuses.
    """

    def __init__(self, source: str, special_tokens: dict[str, str] | None = None):
        from jinja2 import TemplateError
        from jinja2.ext import loopcontrols
        from jinja2.sandbox import ImmutableSandboxedEnvironment

        environment = ImmutableSandboxedEnvironment(
            trim_blocks=True, lstrip_blocks=True, extensions=[loopcontrols]
        )
        # Jinja's own filter escapes for HTML, which would change what the model reads.
        environment.filters["tojson"] = _to_json
        environment.globals["raise_exception"] = _refuse
        environment.globals["strftime_now"] = lambda form: datetime.now().strftime(form)
        self._special_tokens = dict(special_tokens or {})
        self._errors = TemplateError
        try:
            self._template = environment.from_string(source)
        except TemplateError as error:
            raise ValueError(f"this is no chat template: {error}") from error

    @classmethod
    def load(cls, folder: str | PathLike[str]) -> Self:
        """The template of a checkpoint: `chat_template.jinja`, else `tokenizer_config.json`'s.

        Raises:
            ValueError: the folder has none.
        """
        folder = Path(folder)
        about = read_json(folder / TOKENIZER_CONFIG_FILE)
        source = about.get("chat_template")
        if isinstance(source, list):  # several by name
            named = {each["name"]: each["template"] for each in source}
            source = named.get("default")
        if (folder / TEMPLATE_FILE).is_file():
            source = (folder / TEMPLATE_FILE).read_text(encoding="utf-8")
        if not source:
            raise ValueError(
                f"{folder} has no chat template ({TEMPLATE_FILE}, or chat_template in "
                f"{TOKENIZER_CONFIG_FILE}): it is no chat model; give a prompt instead"
            )
        return cls(source, special_tokens(about))

    def render(
        self, messages: list[Message], *, add_generation_prompt: bool = True, **variables: Any
    ) -> str:
        """The messages (`{"role": ..., "content": ...}` each) as one text.

        Args:
            add_generation_prompt: end with what opens the assistant's answer.
            **variables: what else the template understands, such as `tools`.
        """
        variables = self._special_tokens | variables
        try:
            return self._template.render(
                messages=messages, add_generation_prompt=add_generation_prompt, **variables
            )
        except self._errors as error:
            raise ValueError(f"the chat template refuses the messages: {error}") from error


class Chat:
    """A conversation with a model.

    Its cache stays from turn to turn. Where a new prompt begins with all tokens that the cache
    holds, the rest alone is fed; where the template has changed what came before (some leave out
    earlier reasoning), the prompt is fed from its beginning.

    Args:
        model: the model.
        tokenizer: its `encode` must read the template's special tokens as such.
        template: makes a prompt of the messages.
        system: the system message, if any.
        **options: see `GenerationOptions`.
    """

    def __init__(
        self,
        model: NemotronV3ForCausalLM,
        tokenizer: Any,
        template: ChatTemplate,
        system: str | None = None,
        **options: Any,
    ):
        self.model, self.tokenizer, self.template = model, tokenizer, template
        self.options = options
        self.messages: list[Message] = []
        if system is not None:
            self.messages.append({"role": "system", "content": system})
        self.reused_tokens = 0  # tokens of the last prompt that were not fed again
        self._held: list[int] = []
        self._cache: NemotronHybridCache | None = None

    def say(self, text: str) -> Iterator[StreamedToken]:
        """Say something, and stream the answer, which joins the messages when it is complete.

        If it is left early, neither joins: the conversation is as it was before.
        """
        messages = [*self.messages, {"role": "user", "content": text}]
        prompt = list(self.tokenizer.encode(self.template.render(messages)))
        held, cache = self._held, self._cache
        self._held, self._cache = [], None  # an answer left early leaves nothing to go on from
        if cache is None or len(held) >= len(prompt) or prompt[: len(held)] != held:
            held = []
            embedding = self.model.model.embeddings.weight
            cache = NemotronHybridCache(self.model.config, 1, embedding.dtype, embedding.device)
        self.reused_tokens = len(held)
        answer, tokens = "", []
        options = {"tokenizer": self.tokenizer} | self.options
        for token in stream(self.model, prompt, past_key_values=cache, **options):
            answer += token.text
            tokens.append(token.token_id)
            yield token
        self.messages = [*messages, {"role": "assistant", "content": answer}]
        # The cache holds all tokens but the last.
        self._held, self._cache = prompt + tokens[:-1], cache


def special_tokens(tokenizer_config: dict[str, Any]) -> dict[str, str]:
    """The special tokens' texts by name, as a `tokenizer_config.json` gives them."""
    found = {}
    for name, value in tokenizer_config.items():
        if name.endswith("_token"):
            text = value.get("content") if isinstance(value, dict) else value
            if isinstance(text, str):
                found[name] = text
    return found


def read_json(path: Path) -> dict[str, Any]:
    """A JSON file, or nothing where there is none."""
    return json.loads(path.read_text(encoding="utf-8")) if path.is_file() else {}


def _to_json(value: Any, indent: int | None = None, **options: Any) -> str:
    return json.dumps(value, ensure_ascii=False, indent=indent, **options)


def _refuse(message: str) -> None:
    from jinja2 import TemplateError

    raise TemplateError(message)
