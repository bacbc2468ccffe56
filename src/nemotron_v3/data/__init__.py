"""Text to token ids to packed batches."""

from nemotron_v3.data.corpus import Corpus, Document, standard_library
from nemotron_v3.data.packing import Pack, pack_whole, training_packs
from nemotron_v3.data.tokenizer import SEPARATOR_ID, Tokenizer

__all__ = [
    "SEPARATOR_ID",
    "Corpus",
    "Document",
    "Pack",
    "Tokenizer",
    "pack_whole",
    "standard_library",
    "training_packs",
]
