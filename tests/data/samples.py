"""Tokenizers, templates and documents that the tests of the data share."""

import json
from pathlib import Path

import tokenizers
from tokenizers import decoders, models, pre_tokenizers

from nemotron_v3.data.options import DataOptions, Source
from nemotron_v3.data.packed import PackedData
from nemotron_v3.data.pretrained import PretrainedTokenizer

EOS = 256
START, END = 257, 258
TEMPLATE = (
    "{%- for m in messages -%}<start>{{ m.role }}{{ '\\n' }}"
    "{%- if m.role == 'assistant' -%}"
    "{% generation %}{{ m.content }}<end>{% endgeneration %}"
    "{%- else -%}{{ m.content }}<end>{%- endif -%}{%- endfor -%}"
)


def byte_tokenizer(eos: int | None = EOS) -> PretrainedTokenizer:
    """A token a byte, and three special ones."""
    letters = sorted(pre_tokenizers.ByteLevel.alphabet())
    backend = tokenizers.Tokenizer(
        models.BPE(vocab={letter: number for number, letter in enumerate(letters)}, merges=[])
    )
    backend.add_special_tokens(["<eos>", "<start>", "<end>"])
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    backend.decoder = decoders.ByteLevel()
    return PretrainedTokenizer(backend, eos_token_id=eos)


def write_jsonl(path: Path, rows: list) -> Path:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    return path


def chat(*contents: str) -> dict:
    """A user and an assistant, in turns."""
    roles = ("user", "assistant")
    return {
        "messages": [{"role": roles[i % 2], "content": text} for i, text in enumerate(contents)]
    }


def packed(
    cache: Path, *sources: Source | Path, rank: int = 0, world_size: int = 1, **options
) -> PackedData:
    """Data from sources or paths, whose tokens are kept below `cache`."""
    given = tuple(s if isinstance(s, Source) else Source(str(s)) for s in sources)
    options = {"tokens_per_row": 32, "rows": 2, **options}
    return PackedData(
        DataOptions(given, **options), byte_tokenizer(), rank, world_size, cache=cache / "cache"
    )


def documents_of(rows) -> list[list[int]]:
    """The tokens of each document of these rows."""
    return [
        row.input_ids[a:b].tolist()
        for row in rows
        for a, b in zip(row.cu_seqlens, row.cu_seqlens[1:], strict=False)
    ]


def ids(text: str) -> list[int]:
    """A text document's tokens."""
    return [*byte_tokenizer().encode(text), EOS]
