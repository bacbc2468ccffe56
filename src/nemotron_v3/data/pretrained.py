"""The tokeniser of any checkpoint that has a `tokenizer.json`."""

from collections.abc import Sequence
from pathlib import Path
from typing import Self

import tokenizers

from nemotron_v3.data.tokenizer import FILE


class PretrainedTokenizer:
    """Text to token ids and back, as the file says.

    Special tokens spelt out in a text are read as such, and left out of what is decoded.

    Args:
        backend: the tokeniser.
        add_special_tokens: also add the ones that the file puts around every text, such as a bos
            token; not for text, like a chat template's, that has them already.
    """

    def __init__(self, backend: tokenizers.Tokenizer, add_special_tokens: bool = True):
        self._backend = backend
        self._add_special_tokens = add_special_tokens

    @classmethod
    def load(cls, folder: Path, add_special_tokens: bool = True) -> Self:
        """Read the `tokenizer.json` of a folder.

        Raises:
            ValueError: there is none.
        """
        if not (folder / FILE).is_file():
            raise ValueError(f"{folder} has no {FILE}: give a checkpoint that has one")
        return cls(tokenizers.Tokenizer.from_file(str(folder / FILE)), add_special_tokens)

    def encode(self, text: str) -> list[int]:
        return self._backend.encode(text, add_special_tokens=self._add_special_tokens).ids

    def decode(self, ids: Sequence[int]) -> str:
        """The tokens' text; bytes that are not UTF-8 (a character cut in two) read as U+FFFD."""
        return self._backend.decode(list(ids), skip_special_tokens=True)
