"""Conversations: a chat template makes a prompt of the messages, and a cache follows."""

import inspect
from collections.abc import Iterator, Mapping, Sequence
from numbers import Integral
from typing import Any

from nemotron_v3.cache import NemotronHybridCache
from nemotron_v3.chat import Answer, ChatTemplate, Message, is_thinking, parse_answer
from nemotron_v3.chat.answer import THINK, THOUGHT
from nemotron_v3.config.text import check_text
from nemotron_v3.generation.engine import StreamedToken, stream
from nemotron_v3.generation.options import MOST_SEED, GenerationOptions
from nemotron_v3.model.protocol import CausalLM

CLOSE_THOUGHT = f"\n{THOUGHT}\n"


class Chat:
    """A conversation with a model.

    Its cache stays from turn to turn. Where a new prompt begins with all tokens that the cache
    holds, the rest alone is fed; where the template has changed what came before (some leave out
    earlier reasoning), the prompt is fed from its beginning.

    Args:
        model: the model.
        tokenizer: its `encode` must read the template's special tokens as such, and its `decode`
            must write the tags around thoughts and tool calls (`nemotron_v3.chat.MARKUP`). A chat
            has what its template writes and nothing else: an `encode` that takes
            `add_special_tokens` is given False, and another adds no token of its own.
        template: makes a prompt of the messages.
        system: the system message, if any.
        tools: what the model may call: JSON schemas, or functions with annotations and a docstring.
        template_variables: what else the template understands, such as `enable_thinking`.
        thinking_budget: most tokens of a thought, be it the prompt that opens it or the answer:
            where it has not ended then, the end of a thought is written in its place, which counts
            as new tokens, and the answer goes on behind it.
        **options: see `GenerationOptions`.

    Attributes:
        messages: the conversation, which may be changed between turns. An answer's message has
            `content`, and where there are any `reasoning_content` and `tool_calls`.
        answer: the last complete answer, taken apart; None before the first.
        reused_tokens: tokens of the last prompt that were not fed again.

    Raises:
        TypeError: an unknown option.
        ValueError: an option out of range; when something is said, a `thinking_budget` that leaves
            no token to answer with; a variable that would stand in for the messages.
    """

    def __init__(
        self,
        model: CausalLM,
        tokenizer: Any,
        template: ChatTemplate,
        system: str | None = None,
        *,
        tools: Sequence[Any] | None = None,
        template_variables: Mapping[str, Any] | None = None,
        thinking_budget: int | None = None,
        **options: Any,
    ):
        self.model: CausalLM = model
        self.tokenizer: Any = tokenizer
        self.template: ChatTemplate = template
        self.options: dict[str, Any] = {"tokenizer": tokenizer, "num_return_sequences": 1} | options
        self.tools: Sequence[Any] | None = tools
        self.template_variables: dict[str, Any] = dict(template_variables or {})
        self.thinking_budget = thinking_budget
        self.messages: list[Message] = []
        if system is not None:
            self.messages.append({"role": "system", "content": system})
        self.answer: Answer | None = None
        self.reused_tokens = 0
        self._held: list[int] = []
        self._cache: NemotronHybridCache | None = None
        self._check()

    def _check(self) -> None:
        options = GenerationOptions.of(self.options, self.model.generation_config)
        if options.num_return_sequences != 1:
            raise ValueError(
                f"a conversation has one answer at a time, not num_return_sequences="
                f"{options.num_return_sequences}: leave it out"
            )
        _check_names(self.template_variables)
        budget = self.thinking_budget
        if budget is None:
            return
        if isinstance(budget, bool) or not isinstance(budget, int):
            raise TypeError(f"thinking_budget must be an int, got {budget!r}")
        if budget < 0:
            raise ValueError(f"thinking_budget must be at least 0, got {budget}")

    def say(self, text: str, role: str = "user", **variables: Any) -> Iterator[StreamedToken]:
        """Say something, and stream the answer, which joins the messages when it is complete.

        If it is left early, neither joins: the conversation is as it was before.

        Args:
            text: what is said.
            role: who says it; `"tool"` for what a called tool gives back.
            **variables: of the template, for this turn alone.
        """
        messages = [*self.messages, {"role": role, "content": text}]
        _check_names(variables)
        variables = {"tools": self.tools} | self.template_variables | variables
        rendered = self.template.render(messages, **variables)
        check_text(rendered, "the prompt")
        prompt, thinking = _tokens_of(self.tokenizer, rendered), is_thinking(rendered)
        held, cache = self._held, self._cache
        self._held, self._cache = [], None  # an answer left early leaves nothing to go on from
        if cache is None or len(held) >= len(prompt) or prompt[: len(held)] != held:
            held = []
            embedding = self.model.model.embeddings.weight
            cache = NemotronHybridCache(self.model.config, 1, embedding.dtype, embedding.device)
        self.reused_tokens: int = len(held)
        answer, tokens = "", []
        for token in self._tokens(prompt, cache, thinking):
            answer += token.text
            tokens.append(token.token_id)
            yield token
        self.answer = parse_answer(answer, thinking, variables["tools"])
        self.messages = [*messages, self.answer.message]
        # The cache holds all tokens but the last.
        self._held, self._cache = prompt + tokens[:-1], cache

    def _tokens(
        self, prompt: list[int], cache: NemotronHybridCache, thinking: bool
    ) -> Iterator[StreamedToken]:
        """The answer's tokens, with the end of a thought that takes too long."""
        budget = self.thinking_budget
        if budget is None:
            yield from stream(self.model, prompt, past_key_values=cache, **self.options)
            return
        close = _tokens_of(self.tokenizer, CLOSE_THOUGHT)
        options = GenerationOptions.of(self.options, self.model.generation_config)
        most = options.fitted(len(prompt)).limit
        if thinking and most - budget - len(close) < 1:
            raise ValueError(
                f"a thinking_budget of {budget} and the {len(close)} tokens that end a thought "
                f"leave nothing of {most} new tokens: raise max_new_tokens"
            )
        tokens, text = [], ""
        began = 0 if thinking else None  # tokens of the answer before its thought
        if budget or not thinking:
            thought = stream(self.model, prompt, past_key_values=cache, **self.options)
            for token in thought:
                tokens.append(token.token_id)
                text += token.text
                yield token
                if began is None and text.lstrip().startswith(THINK):
                    began = len(tokens)
                if began is None or len(tokens) < began + budget or token.finish_reason:
                    continue
                if THOUGHT not in text and most - len(tokens) - len(close) > 0:
                    break
            else:
                return
            thought.close()
        # What was held back, as it might have begun a stop string, comes with the end.
        whole = self.tokenizer.decode(tokens) if tokens else ""
        rest = whole[len(text) :] if whole.startswith(text) else ""
        for number, token in enumerate(close):
            yield StreamedToken(0, token, "" if number else rest + CLOSE_THOUGHT, None, None)
        left = most - len(tokens) - len(close)
        prompt = prompt + tokens + close
        yield from stream(self.model, prompt, past_key_values=cache, **self._after_thought(left))

    def _after_thought(self, left: int) -> dict[str, Any]:
        """The options of what follows a thought that was ended, with so many tokens left."""
        options = {n: v for n, v in self.options.items() if n != "max_length"}
        options["max_new_tokens"] = left
        seeds = options.get("seed")
        if seeds is not None:
            # The thought's draws again would repeat it.
            seed = seeds if isinstance(seeds, Integral) else seeds[0]
            options["seed"] = seed - 1 if seed == MOST_SEED else seed + 1
        return options


def _tokens_of(tokenizer: Any, text: str) -> list[int]:
    """The tokens of a text and nothing around them, where the tokenizer can leave that out."""
    taken = inspect.signature(tokenizer.encode).parameters
    told = any(p.name == "add_special_tokens" or p.kind is p.VAR_KEYWORD for p in taken.values())
    return list(tokenizer.encode(text, **({"add_special_tokens": False} if told else {})))


def _check_names(variables: Mapping[str, Any]) -> None:
    for name in ("self", "messages", "continue_final_message"):
        if name in variables:
            raise ValueError(
                f"a variable of the template cannot be called {name!r}, which the conversation "
                "itself decides: leave it out"
            )
