"""`nemotron-v3 generate`: text from a checkpoint, as it comes."""

import time
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import tyro

if TYPE_CHECKING:
    from rich.console import Console

    from nemotron_v3.generation import StreamedToken
    from nemotron_v3.model.model import NemotronV3ForCausalLM

DTYPES = ("bfloat16", "float16", "float32", "float64")
GENERATION_CONFIG_FILE = "generation_config.json"


@dataclass(frozen=True, kw_only=True)
class Sampling:
    """How to draw, and when to stop."""

    max_new_tokens: int = 256
    temperature: float = 0.7
    """0 takes the likeliest token every time"""
    top_k: int = 0
    """draw from so many of the likeliest tokens; 0 for all"""
    top_p: float = 0.95
    """draw from the fewest tokens that together have this probability"""
    min_p: float = 0.0
    """draw from tokens at least this times as likely as the likeliest"""
    repetition_penalty: float = 1.0
    seed: int | None = None
    """the same seed gives the same text"""
    stop: tuple[str, ...] = ()
    """texts to stop at, beside the model's own end"""
    prefill_chunk: int | None = None
    """feed a long prompt in pieces of so many tokens"""

    def options(self, folder: Path) -> dict[str, Any]:
        """In the names of `nemotron_v3.generation.GenerationOptions`."""
        from nemotron_v3.generation.chat import read_json

        options: dict[str, Any] = {
            "max_new_tokens": self.max_new_tokens,
            "repetition_penalty": self.repetition_penalty,
            "stop_strings": self.stop,
            "prefill_chunk": self.prefill_chunk,
            # Chat models end a turn with a token that config.json often does not name.
            "eos_token_id": read_json(folder / GENERATION_CONFIG_FILE).get("eos_token_id"),
        }
        if self.temperature != 0:
            names = ("temperature", "top_k", "top_p", "min_p", "seed")
            options |= {"do_sample": True} | {name: getattr(self, name) for name in names}
        return options


# The options' names stand alone: no prefix says which dataclass they come from.
SamplingOptions = Annotated[Sampling, tyro.conf.arg(name=""), tyro.conf.OmitArgPrefixes]


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
    model = _load(path, device, dtype)
    console = Console(highlight=False)
    options = sampling.options(path)
    if chat:
        _converse(model, path, system, prompt, bos, options, console)
    else:
        _continue(model, path, prompt, bos, options, console)


def _load(path: Path, device: str | None, dtype: str | None) -> "NemotronV3ForCausalLM":
    import torch

    from nemotron_v3.checkpoint import from_pretrained

    if dtype is not None and dtype not in DTYPES:
        raise ValueError(f"dtype is {dtype!r}: give one of {', '.join(DTYPES)}")
    device = device or ("cuda" if torch.cuda.is_available() else "cpu")
    model = from_pretrained(path, dtype and getattr(torch, dtype), device)
    return model.eval()


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
    _show(tokens, console)


def _converse(
    model: "NemotronV3ForCausalLM",
    path: Path,
    system: str | None,
    first: str | None,
    bos: bool,
    options: dict[str, Any],
    console: "Console",
) -> None:
    from nemotron_v3.data.pretrained import PretrainedTokenizer
    from nemotron_v3.generation import Chat, ChatTemplate

    if bos:
        raise ValueError("a chat template brings its own bos token: leave --bos out")
    tokenizer = PretrainedTokenizer.load(path, add_special_tokens=False)
    chat = Chat(model, tokenizer, ChatTemplate.load(path), system, **options)
    while True:
        try:
            said = first if first is not None else console.input("[bold]> [/]")
        except EOFError:
            console.print()
            return
        first = None
        if said.strip():
            _show(chat.say(said), console)


def _show(tokens: Iterable["StreamedToken"], console: "Console") -> None:
    """The text as it comes on stdout; what it took, on stderr."""
    from rich.console import Console

    started, count, reason = time.perf_counter(), 0, "interrupted"
    try:
        for token in tokens:
            # Not through the console, which would hold a line back to wrap it.
            console.file.write(token.text)
            console.file.flush()
            count += 1
            reason = token.finish_reason
    except KeyboardInterrupt:
        reason = "interrupted"
    console.file.write("\n")
    console.file.flush()
    rate = count / (time.perf_counter() - started)
    told = f"{count} tokens, {rate:.1f} tokens/s, {reason}"
    Console(stderr=True, highlight=False).print(told, style="dim")
