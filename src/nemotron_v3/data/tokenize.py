"""From a source to its store: read, checked and tokenised once, by any number of processes.

The store is kept in a folder of the cache that is named by all that decides about it: the files
with their sizes and times, the tokeniser, the template. It appears there whole or not at all.
"""

import contextlib
import errno
import hashlib
import json
import os
from collections.abc import Callable, Iterator
from itertools import islice
from pathlib import Path

from nemotron_v3.config.atomic import atomic_folder, settle
from nemotron_v3.data.encode import Encoder
from nemotron_v3.data.find import Found, find_files
from nemotron_v3.data.options import Source
from nemotron_v3.data.read import units_of
from nemotron_v3.data.store import LENGTHS, SIZES, TOKENS, VERSION, TokenStore
from nemotron_v3.data.units import Tokenized, TokenizeUnit
from nemotron_v3.data.workers import run_in_order
from nemotron_v3.data.write import StoreWriter

try:
    import fcntl
except ImportError:  # Windows: two processes may tokenise the same there, and the last one counts
    fcntl = None

_NO_PLACE = (errno.ENOSPC, errno.EDQUOT, errno.EROFS)

Progress = Callable[[int, int], None]
"""Told, after each unit, how many of how many units of a source are done."""


def cache_folder() -> Path:
    """Where stores are kept: `$NEMOTRON_V3_CACHE`, else below the user's cache folder."""
    given = os.environ.get("NEMOTRON_V3_CACHE")
    base = os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache"
    return (Path(given) if given else Path(base) / "nemotron_v3") / "data"


def open_store(
    source: Source,
    encoder: Encoder,
    workers: int,
    cache: Path,
    progress: Progress | None = None,
) -> tuple[TokenStore, Found]:
    """The store of a source, made if the cache has none; and the source's files.

    Processes of one machine that ask for the same wait for the one that makes it.

    Raises:
        ValueError: nothing to read; a source without a document; more than `MOST_BAD` bad lines.
        RuntimeError: a file that changed while it was read; a worker that ended.
        OSError: the disk refuses, a full one included; nothing is left then.
    """
    found = find_files(source)
    folder = cache / _key(source, found, encoder)
    with _telling_of_the_disk(cache), _locked(folder.with_suffix(".lock")):
        settle(folder)
        if folder.exists():
            with contextlib.suppress(ValueError, OSError, KeyError, TypeError):
                return TokenStore(folder), found
        with atomic_folder(folder) as making:
            _make(source, found, encoder, workers, making, progress)
        return TokenStore(folder), found


def _make(
    source: Source,
    found: Found,
    encoder: Encoder,
    workers: int,
    folder: Path,
    progress: Progress | None,
) -> None:
    """Fill `folder` with the store of a source."""
    units = {file: units_of(file, source.field) for file in found.files}
    in_order = [unit for group in units.values() for unit in group]
    results = run_in_order(TokenizeUnit(encoder, source.field), in_order, workers)
    with (
        contextlib.closing(results),
        (folder / TOKENS).open("wb") as tokens,
        (folder / LENGTHS).open("wb") as lengths,
        (folder / SIZES).open("wb") as sizes,
    ):
        writer = StoreWriter(source.path, tokens, lengths, sizes)
        told = _telling(results, len(in_order), progress)
        for file, group in units.items():
            writer.write(file, islice(told, len(group)))
    writer.finish().write(folder)


def _telling(
    results: Iterator[Tokenized], total: int, progress: Progress | None
) -> Iterator[Tokenized]:
    for done, result in enumerate(results, 1):
        yield result
        if progress is not None:
            progress(done, total)


def _key(source: Source, found: Found, encoder: Encoder) -> str:
    """A name for all that decides about the store."""
    told = [
        VERSION,
        os.path.abspath(source.path),
        source.field,
        [file.identity() for file in found.files],
        encoder.fingerprint(),
    ]
    return hashlib.blake2b(json.dumps(told).encode(), digest_size=16).hexdigest()


@contextlib.contextmanager
def _telling_of_the_disk(cache: Path) -> Iterator[None]:
    """Say where tokens go, where there is no place for them."""
    try:
        yield
    except OSError as error:
        if error.errno not in _NO_PLACE:
            raise
        raise OSError(
            error.errno,
            f"{error.strerror}: tokens are kept in {cache}, 4 bytes each; set NEMOTRON_V3_CACHE to "
            "a folder that has the room",
        ) from None


@contextlib.contextmanager
def _locked(path: Path) -> Iterator[None]:
    """Hold a file's lock, in a folder that is made; whoever else wants it waits."""
    path.parent.mkdir(parents=True, exist_ok=True)
    if fcntl is None:
        yield
        return
    with path.open("w") as file:
        with contextlib.suppress(OSError):  # a file system without locks
            fcntl.flock(file, fcntl.LOCK_EX)
        yield
