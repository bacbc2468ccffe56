"""When a row ends, and how its tokens read while it grows."""

from collections.abc import Sequence
from typing import Any

REPLACEMENT = "\ufffd"
# Bytes of a character that is cut short: some decoders write one replacement for each of them.
LONGEST_TAIL = 3


class Detokenizer:
    """The text of a growing row of tokens, in pieces that are never taken back.

    A character whose bytes are spread over several tokens is held back until it is whole. A token
    is decoded together with the one before it, since some decoders treat the first of a text
    differently.
    """

    def __init__(self, tokenizer: Any):
        self._tokenizer = tokenizer
        self._window: list[int] = []
        self._emitted = 0  # characters of the window's text that were given out

    def push(self, token: int) -> str:
        """The text that this token completes."""
        self._window.append(token)
        text = self._tokenizer.decode(self._window)
        whole = len(text) - _unsettled(text)
        piece = text[self._emitted : whole]
        self._emitted = max(self._emitted, whole)
        if whole == len(text) and len(self._window) > 1:
            last = self._tokenizer.decode([token])
            if last:  # one that reads as nothing would not stand before the next as text does
                self._window, self._emitted = [token], len(last)
        return piece


def _unsettled(text: str) -> int:
    """Characters at the end that a further token might change."""
    tail = len(text) - len(text.rstrip(REPLACEMENT))
    return min(tail, LONGEST_TAIL)


class StopStrings:
    """Text that passes through until a stop string appears in it.

    What might be the beginning of a stop string is held back until it is clear.
    """

    def __init__(self, stops: Sequence[str]):
        self._stops = tuple(stops)
        self._held = ""
        self.stopped = False

    def push(self, piece: str) -> str:
        """The text that is now known to come before any stop string."""
        text = self._held + piece
        found = [at for at in (text.find(stop) for stop in self._stops) if at >= 0]
        if found:
            self.stopped: bool = True
            self._held = ""
            return text[: min(found)]
        keep = max((_overlap(text, stop) for stop in self._stops), default=0)
        self._held = text[len(text) - keep :]
        return text[: len(text) - keep]

    def flush(self) -> str:
        """What is held back, at the end of the row."""
        held, self._held = self._held, ""
        return held


def _overlap(text: str, stop: str) -> int:
    """Length of the longest end of `text` that is a beginning of `stop`, but not all of it."""
    for length in range(min(len(text), len(stop) - 1), 0, -1):
        if text.endswith(stop[:length]):
            return length
    return 0


class Row:
    """What one row has got so far, and whether it has ended.

    Args:
        eos: tokens that end it.
        max_new_tokens: tokens after which it ends.
        tokenizer: None where no text is wanted.
        stops: texts that end it.

    Attributes:
        tokens: the new tokens, one that ended the row included.
        logprobs: their log-probabilities, as far as they were given.
        text: how they read: without the token or the stop string that ended the row, and without a
            character that was cut short.
        finish_reason: `"stop"` (a token or a text that ends it), `"length"`, or None.
    """

    def __init__(
        self, eos: frozenset[int], max_new_tokens: int, tokenizer: Any, stops: Sequence[str]
    ):
        self._eos = eos
        self._most = max_new_tokens
        self._detokenizer = None if tokenizer is None else Detokenizer(tokenizer)
        self._stops = StopStrings(stops)
        self._pieces: list[str] = []
        self.tokens: list[int] = []
        self.logprobs: list[float] = []
        self.finish_reason: str | None = None

    @property
    def text(self) -> str:
        return "".join(self._pieces)

    def push(self, token: int, logprob: float | None = None) -> str:
        """Take one more token; the text that is now settled."""
        self.tokens.append(token)
        if logprob is not None:
            self.logprobs.append(logprob)
        ended = token in self._eos
        piece = ""
        if self._detokenizer is not None and not ended:
            piece = self._stops.push(self._detokenizer.push(token))
            ended = self._stops.stopped
        if ended:
            self.finish_reason = "stop"
        elif len(self.tokens) == self._most:
            self.finish_reason = "length"
        if self.finish_reason is not None:
            piece += self._stops.flush()
        self._pieces.append(piece)
        return piece
