"""A corpus that is on every machine: the source of Python's own standard library."""

import hashlib
import sysconfig
from dataclasses import dataclass
from pathlib import Path

# Tests and their data, vendored copies, and what is not part of the library.
LEFT_OUT = frozenset(
    {"test", "tests", "idlelib", "lib2to3", "site-packages", "dist-packages", "__pycache__"}
)
HELD_OUT_EVERY = 20


@dataclass(frozen=True)
class Document:
    """One file: its path below the corpus's root (with `/`) and its text."""

    path: str
    text: str


@dataclass(frozen=True)
class Corpus:
    """Documents to train on and documents held out, each sorted by path."""

    train: tuple[Document, ...]
    held_out: tuple[Document, ...]


def is_held_out(path: str) -> bool:
    """Whether a file is held out: one in twenty, by the hash of its path alone, so that neither
    its text nor its neighbours in another Python's library move it."""
    digest = hashlib.sha256(path.encode()).digest()
    return int.from_bytes(digest[:8], "big") % HELD_OUT_EVERY == 0


def standard_library(root: Path | None = None) -> Corpus:
    """Read the running interpreter's standard library (or the `.py` files below `root`).

    Files that are not UTF-8 and empty files are left out. `ValueError` if nothing is left to train
    on or to hold out, as with a Python that ships its library as a zip file.
    """
    root = Path(sysconfig.get_path("stdlib")) if root is None else root
    train: list[Document] = []
    held_out: list[Document] = []
    for path in sorted(p.relative_to(root).as_posix() for p in root.rglob("*.py")):
        if LEFT_OUT.intersection(path.split("/")):
            continue
        try:
            # Bytes, not read_text: a line ending that is translated is a byte that is not counted.
            text = (root / path).read_bytes().decode("utf-8")
        except UnicodeDecodeError:
            continue
        if text:
            (held_out if is_held_out(path) else train).append(Document(path, text))
    if not train or not held_out:
        raise ValueError(
            f"{root} holds {len(train)} .py files to train on and {len(held_out)} to hold out: "
            "at least one of each is needed; give a folder with more Python source"
        )
    return Corpus(tuple(train), tuple(held_out))
