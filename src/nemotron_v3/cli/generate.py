"""`nemotron-v3 generate`: text from a checkpoint, as it comes."""

import json
import time
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import tyro

if TYPE_CHECKING:
    from rich.console import Console

    from nemotron_v3.generation import StreamedToken
    from nemotron_v3.model.model import NemotronV3ForCausalLM

DTYPES = {
    "bfloat16": "bfloat16",
    "bf16": "bfloat16",
    "float16": "float16",
    "fp16": "float16",
    "float32": "float32",
    "fp32": "float32",
    "float64": "float64",
    "fp64": "float64",
}
# Where neither the user nor the checkpoint says how.
MAX_NEW_TOKENS = 256
DRAWS = {"do_sample": True, "temperature": 0.7, "top_p": 0.95}
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
    seed: int | None = None
    """the same seed gives the same text"""
    stop: tuple[str, ...] = ()
    """texts to stop at, beside the model's own end"""
    prefill_chunk: int | None = None
    """feed a long prompt in pieces of so many tokens"""

    def options(self, generation_config: Mapping[str, Any] | None) -> dict[str, Any]:
        """In the names of `nemotron_v3.generation.GenerationOptions`."""
        told = {n: v for n, v in (generation_config or {}).items() if v is not None}
        names = ("max_new_tokens", "temperature", "top_k", "top_p", "min_p", "repetition_penalty")
        names += ("seed", "prefill_chunk")
        given = {n: v for n in names if (v := getattr(self, n)) is not None}
        if self.stop:
            given["stop_strings"] = self.stop
        options: dict[str, Any] = {"num_return_sequences": 1}
        if "max_new_tokens" not in told and "max_length" not in told:
            options["max_new_tokens"] = MAX_NEW_TOKENS
        if self.temperature == 0:
            draws = ("temperature", "top_k", "top_p", "min_p", "seed")
            rest = {n: v for n, v in given.items() if n not in draws}
            return options | {"do_sample": False} | rest
        if "do_sample" not in told:
            options |= {n: v for n, v in DRAWS.items() if n not in told}
        elif given.keys() & {"temperature", "top_k", "top_p", "min_p", "seed"}:
            options["do_sample"] = True
        return options | given


# The options' names stand alone: no prefix says which dataclass they come from.
SamplingOptions = Annotated[Sampling, tyro.conf.arg(name=""), tyro.conf.OmitArgPrefixes]


@dataclass(frozen=True, kw_only=True)
class Talk:
    """What a chat's template is told beside the messages."""

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


TalkOptions = Annotated[Talk, tyro.conf.arg(name=""), tyro.conf.OmitArgPrefixes]


def generate(
    path: Path,
    /,
    prompt: str | None = None,
    chat: bool = False,
    system: str | None = None,
    bos: bool = False,
    device: str | None = None,
    dtype: str | None = None,
    sampling: SamplingOptions = Sampling(),
    talk: TalkOptions = Talk(),
) -> None:
    """Continue a prompt, or chat, in the terminal; Ctrl-C ends an answer, Ctrl-D a chat.

    Args:
        path: folder of a checkpoint.
        prompt: text to continue; with --chat, what to say first.
        chat: hold a conversation by the checkpoint's chat template.
        system: the system message of a chat.
        bos: begin the prompt with the config's bos token, where tokenizer.json adds none.
        device: cpu, cuda, cuda:1, ...; cuda where there is one.
        dtype: of the weights: bfloat16, float16, float32 or float64; the checkpoint's by default.
    """
    from rich.console import Console

    if prompt is None and not chat:
        raise ValueError("there is nothing to continue: give --prompt TEXT, or --chat")
    if system is not None and not chat:
        raise ValueError("--system is a chat's: add --chat, or put it into the prompt")
    if talk != Talk() and not chat:
        raise ValueError(
            "--no-thinking, --thinking-budget, --template-var and --tools are a chat's: add --chat"
        )
    told = talk.arguments()
    model = _load(path, device, dtype)
    console = Console(highlight=False)
    options = sampling.options(model.generation_config)
    if chat:
        _converse(model, path, system, prompt, bos, told | options, console)
    else:
        _continue(model, path, prompt, bos, options, console)


def _load(path: Path, device: str | None, dtype: str | None) -> "NemotronV3ForCausalLM":
    import torch

    from nemotron_v3.checkpoint import from_pretrained

    if dtype is not None and dtype not in DTYPES:
        raise ValueError(f"dtype is {dtype!r}: give one of {', '.join(DTYPES)}")
    device = device or ("cuda" if torch.cuda.is_available() else "cpu")
    try:
        torch.empty(1, device=device).cpu()
    except (RuntimeError, AssertionError, NotImplementedError) as error:
        why = str(error).strip().partition("\n")[0]
        raise ValueError(f"nothing can be computed on --device {device}: {why}") from error
    model = from_pretrained(path, dtype and getattr(torch, DTYPES[dtype]), device)
    return model.eval()


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


def _continue(
    model: "NemotronV3ForCausalLM",
    path: Path,
    prompt: str,
    bos: bool,
    options: dict[str, Any],
    console: "Console",
) -> None:
    from nemotron_v3.data.pretrained import PretrainedTokenizer
    from nemotron_v3.generation import stream

    tokenizer = PretrainedTokenizer.load(path)
    ids = tokenizer.encode(prompt)
    if bos:
        if model.config.bos_token_id is None:
            raise ValueError(f"the config of {path} names no bos token: leave --bos out")
        ids = [model.config.bos_token_id, *ids]
    if not ids:
        raise ValueError("the prompt is empty: give some text, or --bos")
    tokens = stream(model, ids, tokenizer=tokenizer, **options)
    console.print(prompt, style="dim", end="", markup=False, soft_wrap=True)
    if not _show(tokens, console):
        raise KeyboardInterrupt  # the answer was all that was asked for


def _converse(
    model: "NemotronV3ForCausalLM",
    path: Path,
    system: str | None,
    first: str | None,
    bos: bool,
    arguments: dict[str, Any],
    console: "Console",
) -> None:
    from nemotron_v3.chat import MARKUP
    from nemotron_v3.data.pretrained import PretrainedTokenizer
    from nemotron_v3.generation import Chat, ChatTemplate

    if bos:
        raise ValueError("a chat template brings its own bos token: leave --bos out")
    tokenizer = PretrainedTokenizer.load(path, add_special_tokens=False, keep=MARKUP)
    chat = Chat(model, tokenizer, ChatTemplate.load(path), system, **arguments)
    while True:
        try:
            said = first if first is not None else console.input("[bold]> [/]")
        except EOFError:
            console.print()
            return
        first = None
        if said.strip():
            _show(chat.say(said), console)


def _show(tokens: Iterable["StreamedToken"], console: "Console") -> bool:
    """The text as it comes on stdout; what it took, on stderr. False where it was interrupted."""
    from rich.console import Console

    started, count, reason = time.perf_counter(), 0, "interrupted"
    whole = True
    try:
        for token in tokens:
            # Not through the console, which would hold a line back to wrap it.
            console.file.write(token.text)
            console.file.flush()
            count += 1
            reason = token.finish_reason
    except KeyboardInterrupt:
        reason, whole = "interrupted", False
    console.file.write("\n")
    console.file.flush()
    rate = count / (time.perf_counter() - started)
    told = f"{count} tokens, {rate:.1f} tokens/s, {reason}"
    Console(stderr=True, highlight=False).print(told, style="dim")
    return whole
