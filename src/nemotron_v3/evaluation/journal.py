"""Partial results of an evaluation on the disk, from which it resumes after a kill.

The folder stands beside the file that is to be written. It holds what was asked for, the result of
every checkpoint that is complete, a line for each pass of the others, and of a long document the
states at some place in it.
"""

import contextlib
import json
import shutil
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from nemotron_v3.cache import NemotronHybridCache
from nemotron_v3.config.atomic import atomic_file
from nemotron_v3.config.files import read_object
from nemotron_v3.config.typed import from_object
from nemotron_v3.evaluation.result import MAX_BYTES, CheckpointResult
from nemotron_v3.evaluation.tally import Partial, Tally

ABOUT = "about.json"
SHOWN = 200  # characters of a value that was another one


def folder_of(out: Path) -> Path:
    """Where the journal of an evaluation that is written to `out` stands."""
    return out.with_name(f"{out.name}.partial")


class Journal:
    """The folder of an evaluation, or nothing where no file is written.

    Args:
        folder: where; None keeps nothing.
        rank: of this process, whose lines are in files of its own.
    """

    def __init__(self, folder: Path | None, rank: int):
        self.folder, self.rank = folder, rank
        self._begun: set[Path] = set()

    def open(self, about: dict[str, Any], resume: bool) -> None:
        """Begin, or go on where `resume` says so.

        Args:
            about: what decides about the figures, by name, for JSON.
            resume: whether to go on with what is there.

        Raises:
            ValueError: something is there and `resume` is not given; an evaluation of something
                else, whose differences are named.
        """
        if self.folder is None:
            return
        about = json.loads(json.dumps(about))
        if not self.folder.exists():
            if resume:
                raise ValueError(f"{self.folder} does not exist: there is nothing to go on with")
            self.folder.mkdir(parents=True)
            with atomic_file(self.folder / ABOUT) as path:
                path.write_text(json.dumps(about, indent=1) + "\n", encoding="utf-8")
            return
        if not resume:
            raise ValueError(
                f"{self.folder} is what an interrupted evaluation left: go on with --resume, or "
                "delete it"
            )
        before = read_object(self.folder / ABOUT, MAX_BYTES)
        names = [name for name in {**before, **about} if before.get(name) != about.get(name)]
        if names:
            told = [f"{n}: was {_short(before.get(n))}, is {_short(about.get(n))}" for n in names]
            raise ValueError("\n  - ".join([f"{self.folder} is of another evaluation:", *told]))

    def close(self) -> None:
        """Remove the folder, once the whole is written."""
        if self.folder is not None:
            shutil.rmtree(self.folder)

    # --- checkpoints that are complete ------------------------------------------------------------

    def finished(self, checkpoint: int) -> CheckpointResult | None:
        """The result of a checkpoint, where it is complete; raises `ValueError`."""
        path = self._path(f"checkpoint-{checkpoint}.json")
        if path is None or not path.exists():
            return None
        with _of_an_evaluation(path):
            return CheckpointResult.from_dict(read_object(path, MAX_BYTES))

    def finish(self, checkpoint: int, told: dict[str, Any]) -> None:
        """Keep the result of a checkpoint, as strict JSON has it."""
        path = self._path(f"checkpoint-{checkpoint}.json")
        if path is not None:
            with atomic_file(path) as temporary:
                temporary.write_text(json.dumps(told, allow_nan=False) + "\n", encoding="utf-8")

    # --- documents --------------------------------------------------------------------------------

    def begun(self, checkpoint: int) -> bool:
        """Whether something of a checkpoint is there already."""
        return self.folder is not None and any(self.folder.glob(f"{checkpoint}-*"))

    def read(self, key: str, tally: Tally) -> None:
        """Add to a tally what every process wrote under a key; raises `ValueError`."""
        if self.folder is None:
            return
        for path in sorted(self.folder.glob(f"{key}.rank-*.jsonl")):
            with path.open("rb") as file, _of_an_evaluation(path):
                for line in file:
                    # One without its end was being written when the process was killed.
                    with contextlib.suppress(json.JSONDecodeError):
                        told = from_object(_Line, json.loads(line), "a line")
                        tally.add(told.documents, [Partial.from_dict(part) for part in told.parts])

    def write(self, key: str, documents: Sequence[int], parts: Sequence[Partial]) -> None:
        """Keep the scores of some documents."""
        path = self._path(f"{key}.rank-{self.rank}.jsonl")
        if path is None:
            return
        told = {"documents": list(documents), "parts": [part.to_dict() for part in parts]}
        with path.open("ab") as file:
            if path not in self._begun:
                self._begun.add(path)
                file.write(b"\n")  # ends a line within which a process was killed
            file.write(json.dumps(told).encode() + b"\n")

    # --- a long document --------------------------------------------------------------------------

    def keep(self, key: str, document: int, part: Partial, cache: NemotronHybridCache) -> None:
        """Keep what was scored of a long document, and the states behind it."""
        if self.folder is None:
            return
        states = f"{key}.document-{document}.at-{cache.get_seq_length()}.safetensors"
        before = self._states(key, document)
        cache.save(self.folder / states)
        with atomic_file(self.folder / f"{key}.document-{document}.json") as path:
            path.write_text(json.dumps({"states": states, "part": part.to_dict()}) + "\n")
        for old in before:
            if old.name != states:
                old.unlink()

    def kept(self, key: str, document: int, cache: NemotronHybridCache) -> Partial:
        """What was kept of a long document, whose states are put into `cache`; else nothing.

        Raises:
            ValueError: what stands there is not what `keep` wrote.
        """
        path = self._path(f"{key}.document-{document}.json")
        if self.folder is None or path is None or not path.exists():
            return Partial()
        with _of_an_evaluation(path):
            told = from_object(_Kept, read_object(path, MAX_BYTES), "it")
            part = Partial.from_dict(told.part)
            cache.load(self.folder / Path(told.states).name)
        return part

    def forget(self, key: str, document: int) -> None:
        """Remove what was kept of a long document."""
        path = self._path(f"{key}.document-{document}.json")
        if path is not None:
            path.unlink(missing_ok=True)
            for states in self._states(key, document):
                states.unlink()

    # --- tasks ------------------------------------------------------------------------------------

    def answers(self, checkpoint: int) -> str | None:
        """Where the harness keeps the answers to the requests of its tasks: what its files' names
        begin with."""
        return None if self.folder is None else str(self.folder / f"{checkpoint}-tasks")

    def _states(self, key: str, document: int) -> list[Path]:
        assert self.folder is not None
        return list(self.folder.glob(f"{key}.document-{document}.at-*.safetensors"))

    def _path(self, name: str) -> Path | None:
        return None if self.folder is None else self.folder / name


@dataclass(frozen=True)
class _Line:
    """The scores of documents that shared a pass."""

    documents: list[int]
    parts: list[Any]


@dataclass(frozen=True)
class _Kept:
    """What was scored of a long document, and the file of the states behind it."""

    states: str
    part: Any


@contextlib.contextmanager
def _of_an_evaluation(path: Path) -> Iterator[None]:
    """Name the file of what cannot be gone on with, and the way out."""
    try:
        yield
    except ValueError as error:
        raise ValueError(
            f"{path} is not what an evaluation left: {error}; delete {path.parent} to begin anew"
        ) from None


def _short(value: Any) -> str:
    text = json.dumps(value)
    return text if len(text) <= SHOWN else f"{text[:SHOWN]}..."
