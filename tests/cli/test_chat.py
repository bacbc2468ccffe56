"""A conversation on the command line: its commands, and a terminal with its keys."""

import contextlib
import io
import json
import os
import pty
import re
import select
import stat
import subprocess
import sys
import time
from pathlib import Path

import pytest

from nemotron_v3.checkpoint import from_pretrained
from nemotron_v3.cli.chat import COMMANDS, Conversation, complete_command, history_file
from nemotron_v3.data.pretrained import PretrainedTokenizer
from nemotron_v3.generation import Chat, ChatTemplate
from tests.cli.checkpoint import write_chat_checkpoint

OPTIONS = {"max_new_tokens": 4, "do_sample": False}
CTRL_C, CTRL_D, UP, TAB = "\x03", "\x04", "\x1b[A", "\t"


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    # 4 is <|system|>, which a random model does not write by itself: answers go on.
    return write_chat_checkpoint(tmp_path_factory.mktemp("checkpoint"), end=(4,))


@pytest.fixture
def hold(folder, monkeypatch, capsys):
    """Hold a conversation over lines on standard input; gives it, stdout and stderr."""

    def hold(*lines, system=None):
        text = "".join(f"{line}\n" for line in lines)
        monkeypatch.setattr(sys, "stdin", io.StringIO(text))
        conversation = Conversation(from_pretrained(folder), folder, system, OPTIONS)
        conversation.hold()
        return conversation, *capsys.readouterr()

    return hold


def answers(folder, *said, system=None):
    """The messages of a conversation that the library holds."""
    tokenizer = PretrainedTokenizer.load(folder, add_special_tokens=False)
    chat = Chat(from_pretrained(folder), tokenizer, ChatTemplate.load(folder), system, **OPTIONS)
    for text in said:
        for _ in chat.say(text):
            pass
    return chat.messages


def test_reset_forgets_all_but_the_system_message(folder, hold):
    conversation, _, notes = hold("hello", "/reset", "you say", system="mean it")
    assert conversation.chat.messages == answers(folder, "you say", system="mean it")
    assert "begun anew" in notes


def test_the_system_message_can_be_changed_and_shown(folder, hold):
    conversation, _, notes = hold("/system", "/system say what", "/system", "hello")
    assert conversation.chat.messages == answers(folder, "hello", system="say what")
    assert [n for n in notes.splitlines() if n.startswith("system: ")] == [
        "system: none", "system: say what", "system: say what",
    ]  # fmt: skip
    conversation, *_ = hold("hello", "/system mean it", system="say what")
    assert conversation.chat.messages[0] == {"role": "system", "content": "mean it"}
    assert len(conversation.chat.messages) == 3


def test_a_conversation_is_saved_and_no_file_is_replaced(folder, hold, tmp_path):
    path = tmp_path / "talk.json"
    conversation, _, notes = hold("hello", f"/save {path}", f"/save {path}", "/save")
    assert json.loads(path.read_text()) == conversation.chat.messages == answers(folder, "hello")
    assert "2 messages saved to" in notes and "not saved: " in notes and "give a file" in notes
    assert [p.name for p in tmp_path.iterdir()] == ["talk.json"]
    _, _, notes = hold("/save /nowhere/talk.json")
    assert "not saved: " in notes and "/nowhere" in notes


def test_a_slash_is_a_command_and_two_are_a_text(folder, hold):
    conversation, shown, notes = hold("/rest", "/help", "", "  ", "//system", "a /reset")
    assert "no command /rest: there are /reset, /save, /system, /help" in notes
    assert all(f"{command:<8} {told}" in notes for command, told in COMMANDS.items())
    assert conversation.chat.messages == answers(folder, "/system", "a /reset")
    assert len(shown.splitlines()) >= 2 and "> " not in shown


def test_commands_are_completed():
    def completed(text):
        found = iter(lambda: complete_command(text, len(seen)), None)
        seen = []
        for word in found:
            seen.append(word)
        return seen

    assert completed("/") == [f"{command} " for command in COMMANDS]
    assert completed("/s") == ["/save ", "/system "]
    assert completed("/x") == completed("s") == completed("") == []


def test_history_is_where_the_state_of_programs_is(monkeypatch, tmp_path):
    monkeypatch.setenv("XDG_STATE_HOME", str(tmp_path))
    assert history_file() == tmp_path / "nemotron-v3" / "chat_history"
    monkeypatch.delenv("XDG_STATE_HOME")
    monkeypatch.setattr(Path, "home", lambda: tmp_path)
    assert history_file() == tmp_path / ".local/state/nemotron-v3/chat_history"


class Terminal:
    """A program in a pseudo-terminal, as somebody at the keyboard has it."""

    def __init__(self, *command: str, **environment: str):
        self.shown = ""
        self._keyboard, terminal = pty.openpty()
        self.program = subprocess.Popen(
            command,
            stdin=terminal,
            stdout=terminal,
            stderr=terminal,
            env=os.environ | {"TERM": "vt100"} | environment,
            start_new_session=True,
            # The terminal sends Ctrl-C as a signal only to a session that it controls.
            preexec_fn=lambda: os.close(os.open(os.ttyname(0), os.O_RDWR)),
        )
        os.close(terminal)

    def press(self, keys: str) -> None:
        os.write(self._keyboard, keys.encode())

    def wait_for(self, pattern: str, seconds: float = 90) -> re.Match[str]:
        """Until what came since the last wait matches."""
        end = time.monotonic() + seconds
        while (match := re.search(pattern, self.shown)) is None:
            left = end - time.monotonic()
            assert left > 0, f"no {pattern!r} in {self.shown!r}"
            if select.select([self._keyboard], [], [], min(left, 1))[0]:
                with contextlib.suppress(OSError):  # the program has ended
                    self.shown += os.read(self._keyboard, 4096).decode(errors="replace")
        self.shown = self.shown[match.end() :]
        return match

    def close(self) -> int:
        status = self.program.wait(30)
        os.close(self._keyboard)
        return status


@pytest.mark.integration
def test_a_chat_in_a_terminal(folder, tmp_path):
    command = [sys.executable, "-m", "nemotron_v3", "generate", str(folder), "--chat"]
    options = ["--max-new-tokens", "100000", "--temperature", "0"]
    terminal = Terminal(*command, *options, XDG_STATE_HOME=str(tmp_path))
    # Ctrl-C ends the answer and not the chat; the question is not kept.
    terminal.wait_for("> ")
    terminal.press("say what\r")
    terminal.wait_for("say what\r\n[^\r]{20}")
    terminal.press(CTRL_C)
    terminal.wait_for(r"\d tokens, [\d.]+ tokens/s, interrupted")
    terminal.wait_for("> ")
    # TAB completes a command; the line can be edited before it is sent.
    terminal.press(f"/sy{TAB}menn it\x1b[D\x1b[D\x1b[D\x08\x08an\r")
    terminal.wait_for("system: mean it")
    terminal.wait_for("> ")
    terminal.press(f"/save {tmp_path}/talk.json\r")
    terminal.wait_for("1 messages saved")
    assert json.loads((tmp_path / "talk.json").read_text()) == [
        {"role": "system", "content": "mean it"}
    ]
    # The arrow brings the lines before back.
    terminal.wait_for("> ")
    terminal.press(f"{UP}{UP}{UP}")
    terminal.wait_for("say what")
    terminal.press("\x15")  # Ctrl-U empties the line
    terminal.press(CTRL_D)
    assert terminal.close() == 0
    # So it does in the next chat. Ctrl-C at the prompt leaves.
    history = tmp_path / "nemotron-v3" / "chat_history"
    assert stat.S_IMODE(history.stat().st_mode) == 0o600
    assert history.read_text().splitlines()[-3:-1] == ["say what", "/system mean it"]
    terminal = Terminal(*command, *options, XDG_STATE_HOME=str(tmp_path))
    terminal.wait_for("> ")
    terminal.press(UP)
    terminal.wait_for("/save")
    time.sleep(0.5)  # the line is drawn before the terminal takes keys again
    terminal.press(CTRL_C)
    terminal.wait_for("nemotron-v3: interrupted")
    assert terminal.close() == 130


@pytest.mark.integration
def test_ctrl_c_ends_a_prompt_with_130(folder):
    command = [sys.executable, "-m", "nemotron_v3", "generate", str(folder)]
    terminal = Terminal(*command, "--prompt", "say what", "--max-new-tokens", "100000")
    terminal.wait_for("say what[^\r]{20}")
    terminal.press(CTRL_C)
    terminal.wait_for(r"tokens/s, interrupted[^\r]*\r\nnemotron-v3: interrupted\r\n")
    assert terminal.close() == 130
