"""A conversation in the terminal: line editing, history, and commands that begin with a slash."""

import contextlib
import json
import os
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

from nemotron_v3.cli.terminal import harmless, tell_rate

if TYPE_CHECKING:
    from nemotron_v3.model.model import NemotronV3ForCausalLM

PROMPT = "> "
LONGEST_HISTORY = 1000
COMMANDS = {
    "/reset": "begin anew; the system message stays",
    "/save": "FILE: write the conversation to a new JSON file",
    "/system": "TEXT: change the system message; without TEXT, show it",
    "/help": "these commands; //TEXT says a text that begins with a slash",
}


class Conversation:
    """A chat on stdin and stdout.

    Args:
        model: the model.
        path: its checkpoint, which holds the tokenizer and the chat template.
        system: the system message, if any.
        arguments: further ones of `nemotron_v3.generation.Chat`.
        adapter: that was merged into the model; a chat template beside it is taken.

    Raises:
        ValueError: no tokenizer or template, or an option that cannot be obeyed.
    """

    def __init__(
        self,
        model: "NemotronV3ForCausalLM",
        path: Path,
        system: str | None,
        arguments: dict[str, Any],
        adapter: Path | None = None,
    ):
        from nemotron_v3.chat import MARKUP
        from nemotron_v3.chat.template import template_folder
        from nemotron_v3.data.pretrained import PretrainedTokenizer
        from nemotron_v3.generation import Chat, ChatTemplate

        tokenizer = PretrainedTokenizer.load(path, add_special_tokens=False, keep=MARKUP)
        names = tokenizer.special_tokens
        template = ChatTemplate.load(template_folder(path, adapter)).with_special_tokens(names)
        self.chat: Chat = Chat(model, tokenizer, template, system, **arguments)

    def hold(self, first: str | None = None) -> None:
        """Talk until standard input ends; `first` is said at once."""
        if first is not None and first.strip():
            self._say(first)
        with _line_editing() as read:
            while (line := read()) is not None:
                self._take(line)

    def _take(self, line: str) -> None:
        word, _, rest = line.strip().partition(" ")
        if line.startswith("//"):
            self._say(line[1:])
        elif word in COMMANDS:
            getattr(self, f"_{word[1:]}")(rest.strip())
        elif word.startswith("/"):
            _note(f"no command {word}: there are {', '.join(COMMANDS)}")
        elif word:
            self._say(line)

    def _say(self, text: str) -> None:
        """The answer as it comes; Ctrl-C ends it, and neither it nor the question is kept."""
        started, count, reason = time.perf_counter(), 0, "interrupted"
        try:
            for token in self.chat.say(text):
                sys.stdout.write(harmless(token.text))
                sys.stdout.flush()
                count += 1
                reason = token.finish_reason or reason
        except KeyboardInterrupt:
            reason = "interrupted"
        print(flush=True)
        tell_rate(count, started, reason)

    def _reset(self, _: str) -> None:
        self.chat.messages = [m for m in self.chat.messages[:1] if m["role"] == "system"]
        _note("begun anew")

    def _system(self, text: str) -> None:
        messages = self.chat.messages
        held = bool(messages) and messages[0]["role"] == "system"
        if text:
            messages[: int(held)] = [{"role": "system", "content": text}]
        _note(f"system: {text or (messages[0]['content'] if held else 'none')}")

    def _save(self, name: str) -> None:
        if not name:
            _note("give a file: /save FILE")
            return
        try:
            _write_new(Path(name).expanduser(), json.dumps(self.chat.messages, indent=2) + "\n")
        except OSError as error:
            _note(f"not saved: {error}")
        else:
            _note(f"{len(self.chat.messages)} messages saved to {name}")

    def _help(self, _: str) -> None:
        for command, summary in COMMANDS.items():
            _note(f"{command:<8} {summary}")
        _note("Ctrl-C   end an answer, or leave; Ctrl-D leaves")


def complete_command(text: str, state: int) -> str | None:
    """The command number `state` that begins with `text`, as readline asks for it."""
    matches = [f"{command} " for command in COMMANDS if command.startswith(text)]
    return matches[state] if text.startswith("/") and state < len(matches) else None


@contextlib.contextmanager
def _line_editing() -> Iterator[Callable[[], str | None]]:
    """Give a function that reads a line, None at the end: with editing, completion and the lines
    of earlier chats in a terminal."""
    if not (sys.stdin.isatty() and sys.stdout.isatty()):
        yield lambda: line.removesuffix("\n") if (line := sys.stdin.readline()) else None
        return
    try:
        import readline
    except ImportError:  # Python was built without it
        yield _ask
        return
    completer, delimiters = readline.get_completer(), readline.get_completer_delims()
    readline.set_completer(complete_command)
    readline.set_completer_delims(" \t\n")
    libedit = "libedit" in (readline.__doc__ or "")
    readline.parse_and_bind("bind ^I rl_complete" if libedit else "tab: complete")
    readline.set_history_length(LONGEST_HISTORY)
    history = history_file()
    with contextlib.suppress(OSError):  # none yet, or one that cannot be read
        readline.read_history_file(history)
    try:
        yield _ask
    finally:
        readline.set_completer(completer)
        readline.set_completer_delims(delimiters)
        with contextlib.suppress(OSError):  # a chat is not lost with a full disk
            _keep_history(history, readline.write_history_file)


def _ask() -> str | None:
    try:
        return input(PROMPT)
    except EOFError:
        print()
        return None


def history_file() -> Path:
    """Where the lines of earlier chats are: readable by their owner alone."""
    state = os.environ.get("XDG_STATE_HOME") or Path.home() / ".local" / "state"
    return Path(state) / "nemotron-v3" / "chat_history"


def _keep_history(history: Path, write: Callable[[Path], None]) -> None:
    history.parent.mkdir(parents=True, exist_ok=True, mode=0o700)
    descriptor, scratch = tempfile.mkstemp(dir=history.parent)  # mode 600
    os.close(descriptor)
    try:
        write(Path(scratch))
        os.chmod(scratch, 0o600)
        os.replace(scratch, history)
    except BaseException:
        Path(scratch).unlink(missing_ok=True)
        raise


def _write_new(path: Path, text: str) -> None:
    """Write a file that is not there yet, whole or not at all; raises `OSError`."""
    descriptor, scratch = tempfile.mkstemp(dir=path.parent, prefix=f".{path.name}-")
    try:
        with open(descriptor, "w", encoding="utf-8") as file:
            file.write(text)
        os.link(scratch, path)  # unlike a rename, an error where there is one already
    finally:
        os.unlink(scratch)


def _note(text: str) -> None:
    print(harmless(text), file=sys.stderr, flush=True)
