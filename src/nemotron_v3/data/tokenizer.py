"""A byte-level BPE tokeniser, small enough to train on the spot.

Byte-level: every text has an encoding, and decoding gives back its bytes, so that bits per token
and bits per byte are the same measurement in two units.
"""

import json
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Self

import tokenizers
from tokenizers import decoders, models, pre_tokenizers, processors, trainers

# The one special token. It stands before and after every document: what is predicted after it is
# a document's first token, and predicting it ends the document.
SEPARATOR = "<|endoftext|>"
SEPARATOR_ID = 0

# No token crosses the border of two of these pieces. A line break takes the indentation after it
# along: in source code they are predicted together. Words keep the one character that introduces
# them (` name`, `.name`, `_name`); numbers are cut into single digits.
PIECES = (
    r"(?:\r?\n)+[ \t]*"
    r"|[^\s\p{L}\p{N}]?\p{L}+"
    r"| ?\p{N}"
    r"| ?[^\s\p{L}\p{N}]+"
    r"|\s+"
)

FILE = "tokenizer.json"


_NAMES = ("bos_token", "eos_token", "pad_token")


class Tokenizer:
    """Text to token ids and back; token `SEPARATOR_ID` separates documents.

    Attributes:
        backend: the tokeniser.
        eos_token_id: the separator.
        special_tokens: by the names that a chat template knows them by: all are the separator.
    """

    eos_token_id = SEPARATOR_ID
    special_tokens: Mapping[str, str] = dict.fromkeys(
        ("bos_token", "eos_token", "pad_token"), SEPARATOR
    )

    def __init__(self, backend: tokenizers.Tokenizer) -> None:
        if backend.token_to_id(SEPARATOR) != SEPARATOR_ID:
            raise ValueError(
                f"token {SEPARATOR_ID} of the tokeniser is {backend.id_to_token(SEPARATOR_ID)!r}, "
                f"not {SEPARATOR!r}: use one that `Tokenizer.train` made"
            )
        # A document that contains the separator's spelling is text like any other.
        backend.encode_special_tokens = True
        self.backend = backend

    @classmethod
    def train(cls, texts: Iterable[str], vocab_size: int) -> Self:
        """Learn `vocab_size` tokens from the texts; the same texts give the same tokens.

        `ValueError` if `vocab_size` has no room for the 256 bytes and the separator.
        """
        if vocab_size <= 257:
            raise ValueError(
                f"vocab_size {vocab_size} is too small: 256 bytes and the separator come first; "
                "give at least 258, or 2048 to 4096 for more than a try"
            )
        backend = tokenizers.Tokenizer(models.BPE())
        backend.pre_tokenizer = pre_tokenizers.Sequence(
            [
                pre_tokenizers.Split(tokenizers.Regex(PIECES), behavior="isolated"),
                pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False),
            ]
        )
        backend.decoder = decoders.ByteLevel()
        # Whoever reads the file puts the separator in front of a text, as it was in training.
        backend.post_processor = processors.TemplateProcessing(
            single=f"{SEPARATOR} $A", special_tokens=[(SEPARATOR, SEPARATOR_ID)]
        )
        trainer = trainers.BpeTrainer(
            vocab_size=vocab_size,
            special_tokens=[SEPARATOR],
            initial_alphabet=sorted(pre_tokenizers.ByteLevel.alphabet()),
            show_progress=False,
        )
        backend.train_from_iterator(texts, trainer)
        return cls(backend)

    @classmethod
    def load(cls, folder: Path) -> Self:
        """Read the `tokenizer.json` of a folder."""
        return cls(tokenizers.Tokenizer.from_file(str(folder / FILE)))

    def save(self, folder: Path) -> None:
        """Write its files (see `texts`)."""
        for name, text in self.texts().items():
            (folder / name).write_text(text, encoding="utf-8")

    def texts(self) -> dict[str, str]:
        """`tokenizer.json`, and beside it the few lines by which transformers' AutoTokenizer knows
        what to make of it, by name."""
        about = {
            "tokenizer_class": "PreTrainedTokenizerFast",
            **self.special_tokens,
            "clean_up_tokenization_spaces": False,
        }
        return {
            FILE: self.backend.to_str(pretty=True),
            "tokenizer_config.json": json.dumps(about, indent=2) + "\n",
        }

    @property
    def vocab_size(self) -> int:
        return self.backend.get_vocab_size()

    def encode(self, text: str) -> list[int]:
        """The text's tokens, without separators."""
        return self.backend.encode(text, add_special_tokens=False).ids

    def decode(self, ids: Iterable[int]) -> str:
        """The tokens' text; bytes that are not UTF-8 (a token cut in two) read as U+FFFD."""
        return self.backend.decode(list(ids), skip_special_tokens=True)

    def frame(self) -> tuple[list[int], list[int]]:
        """The tokens before and behind a document in training."""
        return [SEPARATOR_ID], [SEPARATOR_ID]

    def encode_documents(self, texts: Iterable[str]) -> list[list[int]]:
        """Each text as `separator, tokens, separator`."""
        encodings = self.backend.encode_batch_fast(list(texts), add_special_tokens=False)
        return [[SEPARATOR_ID, *encoding.ids, SEPARATOR_ID] for encoding in encodings]
