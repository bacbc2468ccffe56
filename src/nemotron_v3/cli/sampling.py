"""Options of `nemotron-v3 generate` that say how to draw, and what a chat's template gets."""

import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any

import tyro

# Where neither the user nor the checkpoint says how.
MAX_NEW_TOKENS = 256
DRAWS: dict[str, bool | float] = {"do_sample": True, "temperature": 0.7, "top_p": 0.95}
MAX_TOOLS_BYTES = 2**24


@dataclass(frozen=True, kw_only=True)
class Sampling:
    """How to draw, and when to stop. What is not given is as the checkpoint's
    generation_config.json says."""

    max_new_tokens: int | None = None
    """256, where the checkpoint says nothing"""
    temperature: float | None = None
    """0 takes the likeliest token every time; 0.7, where the checkpoint says nothing"""
    top_k: int | None = None
    """draw from so many of the likeliest tokens; 0 for all"""
    top_p: float | None = None
    """draw from the fewest tokens that together have this probability; 0.95, where the checkpoint
    says nothing"""
    min_p: float | None = None
    """draw from tokens at least this times as likely as the likeliest"""
    repetition_penalty: float | None = None
    """above 1 makes tokens less likely that the text holds already"""
    seed: int | None = None
    """the same seed gives the same text; of several prompts each has its own, counted from it"""
    stop: tuple[str, ...] = ()
    """texts to stop at, beside the model's own end"""
    prefill_chunk: int | None = None
    """feed a long prompt in pieces of so many tokens"""

    def options(self, generation_config: Mapping[str, Any] | None) -> dict[str, Any]:
        """In the names of `nemotron_v3.generation.GenerationOptions`."""
        model_values = {n: v for n, v in (generation_config or {}).items() if v is not None}
        names = ("max_new_tokens", "temperature", "top_k", "top_p", "min_p", "repetition_penalty")
        names += ("seed", "prefill_chunk")
        given = {n: v for n in names if (v := getattr(self, n)) is not None}
        if self.stop:
            given["stop_strings"] = self.stop
        options: dict[str, Any] = {"num_return_sequences": 1}
        if "max_new_tokens" not in model_values and "max_length" not in model_values:
            options["max_new_tokens"] = MAX_NEW_TOKENS
        if self.temperature == 0:
            draws = ("temperature", "top_k", "top_p", "min_p", "seed")
            rest = {n: v for n, v in given.items() if n not in draws}
            return options | {"do_sample": False} | rest
        if "do_sample" not in model_values:
            options |= {n: v for n, v in DRAWS.items() if n not in model_values}
        elif given.keys() & {"temperature", "top_k", "top_p", "min_p", "seed"}:
            options["do_sample"] = True
        return options | given


@dataclass(frozen=True, kw_only=True)
class Talk:
    """What a chat's template gets beside the messages."""

    thinking: bool = True
    """--no-thinking tells the template enable_thinking=false; else the template decides"""
    thinking_budget: int | None = None
    """most tokens of a thought"""
    template_var: Annotated[tuple[str, ...], tyro.conf.UseAppendAction] = ()
    """NAME=VALUE for the template, as often as there are some; a VALUE that is JSON is read as
    such"""
    tools: Path | None = None
    """a JSON file with a list of the tools that the model may call"""

    def arguments(self) -> dict[str, Any]:
        """In the names of `nemotron_v3.generation.Chat`."""
        variables = dict(map(_variable, self.template_var))
        if not self.thinking:
            if variables.get("enable_thinking", False) is not False:
                raise ValueError(
                    "--no-thinking and --template-var enable_thinking say different things: give "
                    "one of them"
                )
            variables["enable_thinking"] = False
        return {
            "template_variables": variables,
            "thinking_budget": self.thinking_budget,
            "tools": None if self.tools is None else _read_tools(self.tools),
        }


def _variable(given: str) -> tuple[str, Any]:
    name, equals, value = given.partition("=")
    if not equals or not name.isidentifier():
        raise ValueError(f"--template-var {given!r}: give NAME=VALUE")
    try:
        return name, json.loads(value)
    except (ValueError, RecursionError):
        return name, value


def _read_tools(path: Path) -> list[Any]:
    from nemotron_v3.config.files import read_text

    try:
        tools = json.loads(read_text(path, MAX_TOOLS_BYTES))
    except RecursionError:
        tools = None
    except json.JSONDecodeError as error:
        raise ValueError(f"--tools {path} is no JSON that can be read: {error}") from None
    if not isinstance(tools, list) or not all(isinstance(tool, dict) for tool in tools):
        raise ValueError(f"--tools {path} holds no list of tools: give a JSON schema for each")
    return tools
