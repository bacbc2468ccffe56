"""`nemotron-v3 generate`: text from a checkpoint, as it comes."""

import json
import sys
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import tyro

from nemotron_v3.cli.dtypes import DTYPES, dtype_name
from nemotron_v3.cli.options import Choices
from nemotron_v3.cli.sampling import Sampling, Talk
from nemotron_v3.cli.terminal import harmless, new_console, tell_rate

if TYPE_CHECKING:
    from nemotron_v3.generation import StreamedToken
    from nemotron_v3.model.model import NemotronV3ForCausalLM

MAX_PROMPT_BYTES = 2**28
STANDARD_INPUT = Path("-")


@dataclass(frozen=True, kw_only=True)
class Generate:
    """Continue prompts, or chat, in the terminal; Ctrl-C ends an answer, Ctrl-D a chat.

    Without --prompt, --prompt-file and --chat the prompt is read from standard input.
    """

    path: tyro.conf.Positional[Path]
    """folder of a checkpoint"""
    prompt: tyro.conf.UseAppendAction[tuple[str, ...]] = ()
    """text to continue, as often as there are some; with --chat, what to say first"""
    prompt_file: tyro.conf.UseAppendAction[tuple[Path, ...]] = ()
    """a file with a text to continue, as often as there are some; - for standard input. A line
    break at its very end is left out"""
    chat: bool = False
    """hold a conversation by the checkpoint's chat template; /help there lists its commands"""
    system: str | None = None
    """the system message of a chat"""
    adapter: Path | None = None
    """folder of a LoRA adapter in PEFT's format, merged into the weights in memory"""
    json: bool = False
    """print one JSON object a prompt, on a line of its own, when all are complete"""
    bos: bool = False
    """begin the prompt with the config's bos token, where tokenizer.json adds none"""
    device: str | None = None
    """cpu, cuda, cuda:1, ...; cuda where there is one"""
    dtype: Annotated[str | None, Choices(tuple(DTYPES))] = None
    """of the weights: bfloat16, float16, float32 or float64 (bf16, fp16, ...); the checkpoint's by
    default"""
    # The options' names stand alone: no prefix says which dataclass they come from.
    sampling: Annotated[Sampling, tyro.conf.arg(name=""), tyro.conf.OmitArgPrefixes] = Sampling()
    talk: Annotated[Talk, tyro.conf.arg(name=""), tyro.conf.OmitArgPrefixes] = Talk()

    def run(self) -> None:
        self._check()
        arguments = self.talk.arguments()
        prompts = self._prompts()
        model = self._load()
        options = self.sampling.options(model.generation_config)
        if self.chat:
            from nemotron_v3.cli.chat import Conversation

            first = prompts[0] if prompts else None
            talk = Conversation(model, self.path, self.system, arguments | options, self.adapter)
            talk.hold(first)
            return
        tokens, lengths = self._stream(model, prompts, options)
        rows = [Continuation(*row) for row in zip(prompts, lengths, strict=True)]
        write_continuations(tokens, rows, as_json=self.json)

    def _check(self) -> None:
        """Raise `ValueError` for texts that are none and options that contradict each other."""
        from nemotron_v3.config.text import check_text

        texts = {"--prompt": self.prompt, "--stop": self.sampling.stop}
        texts["--system"] = () if self.system is None else (self.system,)
        for name, given in texts.items():
            for text in given:
                check_text(text, name)
        if self.chat:
            if self.bos:
                raise ValueError("a chat template brings its own bos token: leave --bos out")
            if self.json:
                raise ValueError("--json is for prompts: a chat is written to a file by /save")
            if len(self.prompt) + len(self.prompt_file) > 1:
                raise ValueError("a chat begins with one prompt at most: give one")
            if STANDARD_INPUT in self.prompt_file:
                raise ValueError("a chat is held on standard input: give --prompt, or a file")
            return
        if self.system is not None:
            raise ValueError("--system is a chat's: add --chat, or put it into the prompt")
        if self.talk != Talk():
            raise ValueError(
                "--no-thinking, --thinking-budget, --template-var and --tools are a chat's: add "
                "--chat"
            )
        if self.prompt_file.count(STANDARD_INPUT) > 1:
            raise ValueError("standard input can be read once: give --prompt-file - once")

    def _prompts(self) -> list[str]:
        """All prompts: those on the command line, then those in files, else standard input."""
        from nemotron_v3.config.files import read_text

        prompts = list(self.prompt)
        for file in self.prompt_file:
            if file == STANDARD_INPUT:
                prompts.append(_read_standard_input())
            else:
                prompts.append(_without_last_break(read_text(file, MAX_PROMPT_BYTES)))
        if not prompts and not self.chat:
            text = "" if _is_terminal(sys.stdin) else _read_standard_input()
            if not text:
                raise ValueError(
                    "there is nothing to continue: give --prompt TEXT, or --chat, or a text on "
                    "standard input"
                )
            prompts.append(text)
        return prompts

    def _load(self) -> "NemotronV3ForCausalLM":
        import torch

        from nemotron_v3.checkpoint import from_pretrained, merge_adapter

        dtype = None if self.dtype is None else getattr(torch, dtype_name(self.dtype))
        device = self.device
        if device is None:
            device = "cuda" if torch.cuda.is_available() else "cpu"
        check_device(device)
        model = from_pretrained(self.path, dtype, device)
        if self.adapter is not None:
            merge_adapter(model, self.adapter)
        return model.eval()

    def _stream(
        self, model: "NemotronV3ForCausalLM", prompts: Sequence[str], options: dict[str, Any]
    ) -> tuple[Iterator["StreamedToken"], list[int]]:
        """The new tokens as they come, and the number of tokens of each prompt."""
        from nemotron_v3.data.pretrained import PretrainedTokenizer
        from nemotron_v3.generation import stream

        tokenizer = PretrainedTokenizer.load(self.path)
        rows = [tokenizer.encode(prompt) for prompt in prompts]
        if self.bos:
            if model.config.bos_token_id is None:
                raise ValueError(f"the config of {self.path} names no bos token: leave --bos out")
            rows = [[model.config.bos_token_id, *ids] for ids in rows]
        if not all(rows):
            raise ValueError("the prompt is empty: give some text, or --bos")
        return stream(model, rows, tokenizer=tokenizer, **options), list(map(len, rows))


@dataclass
class Continuation:
    """A prompt and what followed it so far."""

    prompt: str
    prompt_tokens: int
    text: str = ""
    token_ids: list[int] = field(default_factory=list)
    finish_reason: str | None = None
    written: int = 0  # characters of `text` that are on the terminal

    def add(self, token: "StreamedToken") -> None:
        self.text += token.text
        self.token_ids.append(token.token_id)
        self.finish_reason = token.finish_reason

    def as_json(self) -> dict[str, Any]:
        """As JSON has it."""
        return {
            "prompt": self.prompt,
            "text": self.text,
            "finish_reason": self.finish_reason or "interrupted",
            "prompt_tokens": self.prompt_tokens,
            "token_ids": self.token_ids,
        }


def write_continuations(
    tokens: Iterator["StreamedToken"], rows: list[Continuation], as_json: bool
) -> None:
    """The texts on stdout in order, the first one that is not complete as it comes; what it took,
    on stderr. Raises `KeyboardInterrupt` after a Ctrl-C, with what there is written."""
    started, interrupted = time.perf_counter(), False
    shown = 0 if not as_json else len(rows)
    try:
        if not as_json:
            _begin(rows[0])
        for token in tokens:
            rows[token.row].add(token)
            while shown < len(rows):
                _continue(rows[shown])
                if rows[shown].finish_reason is None:
                    break
                print()
                shown += 1
                if shown < len(rows):
                    print()
                    _begin(rows[shown])
    except KeyboardInterrupt:
        interrupted = True
    if shown < len(rows):
        print()
    if as_json:
        for row in rows:
            print(json.dumps(row.as_json()), flush=True)
    reasons = ", ".join(dict.fromkeys(row.finish_reason or "interrupted" for row in rows))
    tell_rate(sum(len(row.token_ids) for row in rows), started, reasons)
    if interrupted:
        raise KeyboardInterrupt  # the answer was all that was asked for


def _begin(row: Continuation) -> None:
    from rich.text import Text

    new_console().print(Text(harmless(row.prompt), style="dim"), end="", soft_wrap=True)


def _continue(row: Continuation) -> None:
    sys.stdout.write(harmless(row.text[row.written :]))
    sys.stdout.flush()
    row.written = len(row.text)


def check_device(device: str) -> None:
    """Raise `ValueError` where nothing can be computed on a device of that name."""
    import torch

    try:
        torch.empty(1, device=device).cpu()
    except Exception as error:  # each backend has classes of its own for it
        why = str(error).strip().partition("\n")[0] or type(error).__name__
        raise ValueError(f"nothing can be computed on --device {device}: {why}") from error


def _read_standard_input() -> str:
    raw = sys.stdin.buffer.read(MAX_PROMPT_BYTES + 1)
    if len(raw) > MAX_PROMPT_BYTES:
        raise ValueError(f"standard input holds more than the {MAX_PROMPT_BYTES} bytes of a prompt")
    try:
        return _without_last_break(raw.decode())
    except UnicodeDecodeError as error:
        raise ValueError(f"standard input is not UTF-8: {error}") from None


def _without_last_break(text: str) -> str:
    return text.removesuffix("\n").removesuffix("\r")


def _is_terminal(file: Any) -> bool:
    return file is None or file.closed or file.isatty()
