"""Text to token ids to packed batches."""

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from nemotron_v3.data.corpus import Corpus, Document, standard_library
    from nemotron_v3.data.options import DataOptions, Source
    from nemotron_v3.data.packed import PackedData
    from nemotron_v3.data.packing import Pack, pack_whole, training_packs
    from nemotron_v3.data.pieces import PackedRow
    from nemotron_v3.data.pretrained import PretrainedTokenizer
    from nemotron_v3.data.report import DataReport
    from nemotron_v3.data.tokenizer import SEPARATOR_ID, Tokenizer

__all__ = [
    "SEPARATOR_ID",
    "Corpus",
    "DataOptions",
    "DataReport",
    "Document",
    "Pack",
    "PackedData",
    "PackedRow",
    "PretrainedTokenizer",
    "Source",
    "Tokenizer",
    "pack_whole",
    "standard_library",
    "training_packs",
]

# Imported when they are asked for (PEP 562): options are read without torch, and the processes
# that tokenise start without it.
_FILES = {
    "SEPARATOR_ID": "tokenizer",
    "Corpus": "corpus",
    "DataOptions": "options",
    "DataReport": "report",
    "Document": "corpus",
    "Pack": "packing",
    "PackedData": "packed",
    "PackedRow": "pieces",
    "PretrainedTokenizer": "pretrained",
    "Source": "options",
    "Tokenizer": "tokenizer",
    "pack_whole": "packing",
    "standard_library": "corpus",
    "training_packs": "packing",
}


def __getattr__(name: str) -> Any:
    if name not in _FILES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    value = getattr(import_module(f"{__name__}.{_FILES[name]}"), name)
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})
