"""The tokeniser of any checkpoint that has a `tokenizer.json`."""

from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Self

import tokenizers

from nemotron_v3.chat.template import read_special_tokens
from nemotron_v3.config.files import exists, read_bytes
from nemotron_v3.config.missing import instead_of_a_model
from nemotron_v3.config.text import check_text
from nemotron_v3.data.tokenizer import FILE

MAX_BYTES = 2**28  # of a tokenizer.json; those with 262,144 tokens have 2**25


class PretrainedTokenizer:
    """Text to token ids and back, as the file says.

    Special tokens spelt out in a text are read as such, and left out of what is decoded.

    Args:
        backend: the tokeniser.
        add_special_tokens: also add the ones that the file puts around every text, such as a bos
            token; not for text, like a chat template's, that has them already.
        keep: texts of special tokens that are not left out, such as the tags of an answer.
        eos_token_id: the token that ends a document in training, or None.
        special_tokens: texts of special tokens that a chat template may ask for by name, such as
            `bos_token`.

    Attributes:
        backend: the tokeniser.
        eos_token_id: as given.
        special_tokens: as given.
    """

    def __init__(
        self,
        backend: tokenizers.Tokenizer,
        add_special_tokens: bool = True,
        keep: Iterable[str] = (),
        eos_token_id: int | None = None,
        special_tokens: Mapping[str, str] | None = None,
    ):
        self.backend = backend
        self.eos_token_id = eos_token_id
        self.special_tokens: dict[str, str] = dict(special_tokens or {})
        self._add_special_tokens = add_special_tokens
        kept, added = frozenset(keep), backend.get_added_tokens_decoder()
        self._left_out = {n for n, t in added.items() if t.special and t.content not in kept}

    @classmethod
    def load(cls, folder: Path, add_special_tokens: bool = True, keep: Iterable[str] = ()) -> Self:
        """Read the `tokenizer.json` of a folder, and which token ends a document there: the
        `eos_token` of `tokenizer_config.json` or `special_tokens_map.json`.

        Raises:
            ValueError: there is none, or something else than a tokeniser's file.
        """
        path = Path(folder) / FILE
        if not exists(path):
            missing = f"{folder} has no {FILE}: give a checkpoint that has one"
            raise ValueError(instead_of_a_model(folder) or missing)
        backend = read_backend(path)
        special_tokens = read_special_tokens(folder)
        eos = special_tokens.get("eos_token")
        number = None if eos is None else backend.token_to_id(eos)
        return cls(backend, add_special_tokens, keep, number, special_tokens)

    def frame(self) -> tuple[list[int], list[int]]:
        """The tokens before and behind a document in training: those that the file puts around
        every text, and the one that ends a document."""
        encoding = self.backend.encode("a", add_special_tokens=self._add_special_tokens)
        mask = encoding.special_tokens_mask
        start = mask.index(0)
        stop = len(mask) - mask[::-1].index(0)
        before, behind = encoding.ids[:start], encoding.ids[stop:]
        if self.eos_token_id is not None and self.eos_token_id not in behind:
            behind.append(self.eos_token_id)
        return before, behind

    def encode(self, text: str, add_special_tokens: bool | None = None) -> list[int]:
        """The text's tokens, as a prompt has them: nothing ends it.

        Args:
            add_special_tokens: those that the file puts around every text; None is as the
                tokenizer was loaded.

        Raises:
            ValueError: no text: half a character is in it.
        """
        check_text(text, "the text")
        adds = self._add_special_tokens if add_special_tokens is None else add_special_tokens
        return self.backend.encode(text, add_special_tokens=adds).ids

    def encode_documents(self, texts: Iterable[str]) -> list[list[int]]:
        """Each text as a document to train on: its tokens within those of `frame`.

        Raises:
            ValueError: no text: half a character is in it.
        """
        texts = list(texts)
        for text in texts:
            check_text(text, "the text")
        before, behind = self.frame()
        encodings = self.backend.encode_batch_fast(texts, add_special_tokens=False)
        return [[*before, *encoding.ids, *behind] for encoding in encodings]

    def decode(self, ids: Sequence[int]) -> str:
        """The tokens' text; bytes that are not UTF-8 (a character cut in two) read as U+FFFD."""
        ids = [number for number in ids if number not in self._left_out]
        return self.backend.decode(ids, skip_special_tokens=False)


def read_backend(path: Path) -> tokenizers.Tokenizer:
    """The tokeniser in a file.

    Raises:
        ValueError: no regular file, or not a tokeniser's.
        OSError: it is not there, or cannot be read.
    """
    raw = read_bytes(path, MAX_BYTES)
    try:
        return tokenizers.Tokenizer.from_buffer(raw)
    except Exception as error:  # the library has no class of its own for it
        raise ValueError(f"{path} is no tokenizer: {error}") from None
