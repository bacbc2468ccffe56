"""Documents from any source as the rows of training steps."""

from collections.abc import Iterator, Mapping
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import asdict, dataclass
from math import ceil
from pathlib import Path
from typing import Any, Self

from nemotron_v3.config.typed import from_object
from nemotron_v3.data.encode import DataTokenizer, Encoder
from nemotron_v3.data.find import Found
from nemotron_v3.data.fingerprint import Fingerprint, differences, fingerprint
from nemotron_v3.data.options import DataOptions
from nemotron_v3.data.pieces import PackedRow, Pieces
from nemotron_v3.data.plan import Position, RowPlan
from nemotron_v3.data.report import DataReport, SourceReport
from nemotron_v3.data.store import TokenStore
from nemotron_v3.data.tokenize import Progress, cache_folder, open_store

STATE_VERSION = 1


class PackedData:
    """Iterating gives, step after step, the rows of this rank.

    Everything is read, checked and tokenised before the first step, by `options.workers` processes,
    and kept on disk (4 bytes a token), so that a later run finds it. What lies in which row is a
    function of the seed and the position; rows are dealt to ranks afterwards, row i of a step to
    rank `i % world_size`. Every rank gets the same number of rows in each step: rows of padding
    stand in for what is missing where `rows` is no multiple of the ranks, and in the last step.
    With workers, a step's rows are read while the step before is computed.

    Args:
        options: what to train on.
        tokenizer: the demo's `Tokenizer` or a checkpoint's `PretrainedTokenizer`.
        rank, world_size: which of how many processes this is.
        cache: a folder for the tokens; None is `cache_folder()`. Ranks of one machine wait for the
            first that tokenises.
        progress: told how many units of a source are done.

    Attributes:
        options: as given.
        largest_token: the largest token id.

    Raises:
        ValueError: sources that cannot be read or hold no document, more than 100 bad lines in one,
            chats without a template, or with one that marks no assistant's words; a rank that is
            none. Nothing of such a source is kept.
        OSError: the disk refuses, a full one included.
    """

    def __init__(
        self,
        options: DataOptions,
        tokenizer: DataTokenizer,
        rank: int = 0,
        world_size: int = 1,
        *,
        cache: Path | None = None,
        progress: Progress | None = None,
    ):
        if not 0 <= rank < world_size:
            raise ValueError(f"rank is {rank} of {world_size}: give one from 0 to world_size - 1")
        self.options = options
        self._rank, self._world_size = rank, world_size
        encoder = Encoder.of(tokenizer, options.chat_template, options.train_on)
        cache = cache_folder() if cache is None else Path(cache)
        self._stores: list[TokenStore] = []
        self._found: list[Found] = []
        for source in options.sources:
            store, found = open_store(source, encoder, options.workers, cache, progress)
            self._stores.append(store)
            self._found.append(found)
        padding = encoder.behind[-1] if encoder.behind else 0
        self._pieces = Pieces(self._stores, options.tokens_per_row, padding)
        self.largest_token: int = max(store.about.largest for store in self._stores)
        self._plan = self._new_plan()
        self._position = Position()
        self._reader = ThreadPoolExecutor(1) if options.workers else None
        self._ahead: Future[tuple[list[PackedRow], Position]] | None = None
        self._total_steps: int | None = None
        if not self._plan.take(self._position, 1)[0]:
            raise ValueError(
                f"epochs {options.epochs} of these sources and weights hold no document: give more"
            )

    def __iter__(self) -> Iterator[list[PackedRow]]:
        return self

    def __next__(self) -> list[PackedRow]:
        if self._reader is None:
            rows, behind = self._step(self._position)
        else:
            ahead = self._ahead or self._reader.submit(self._step, self._position)
            self._ahead = None
            rows, behind = ahead.result()
            if rows:
                self._ahead = self._reader.submit(self._step, behind)
        if not rows:
            raise StopIteration
        self._position = behind
        return rows

    def total_steps(self, at_most: int | None = None) -> int | None:
        """Steps from the first to the end, None where the epochs are without end.

        It packs all epochs to know, at about a million documents in three seconds; for who asks
        whether there are `at_most`, so many of them as hold that number, which is given then.
        """
        if self._total_steps is not None:
            return self._total_steps if at_most is None else min(self._total_steps, at_most)
        each = self.options.rows
        rows = self._new_plan().total_rows(None if at_most is None else at_most * each)
        steps = None if rows is None else ceil(rows / each)
        if at_most is None or (steps is not None and steps < at_most):
            self._total_steps = steps
        return steps

    def fingerprint(self) -> dict[str, Any]:
        """What decides about the token ids of every row, to be kept with a checkpoint."""
        return fingerprint(self.options, self._stores)

    def state_dict(self) -> dict[str, Any]:
        """The exact position behind the last step that was handed out, for JSON; the same on
        every rank and for any number of them."""
        return {
            "version": STATE_VERSION,
            "position": self._position.to_dict(),
            "epochs": self.options.epochs,
            "data": self.fingerprint(),
        }

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Go on behind the step at which the state was taken.

        The number of ranks, rows of a step, workers and epochs may be others than then.

        Raises:
            ValueError: a state of other data, which is named, or none that `state_dict` gave;
                nothing is changed then.
        """
        if state.get("version") != STATE_VERSION:
            raise ValueError(f"a data position of version {state.get('version')!r} is not known")
        told = from_object(_State, state, "the data's state")
        position = told.position
        found = differences(asdict(told.data), self.fingerprint())
        epochs = told.epochs, self.options.epochs
        if epochs[0] != epochs[1] and any(_is_partial(position.epoch, e) for e in epochs):
            found.append(
                f"epochs was {epochs[0]}, is {epochs[1]}, and the run stands in the part of an "
                "epoch that one of them ends with, which has rows of its own"
            )
        if found:
            raise ValueError(
                "\n  - ".join(["the run was trained on other data than these:", *found])
            )
        if position.rows and told.epochs is not None and position.epoch >= told.epochs:
            raise ValueError(f"the position is in epoch {position.epoch} of {told.epochs:g}")
        self._plan.check(position)
        self._ahead = None
        self._position = position

    def report(self) -> DataReport:
        """What was found, counted, left out and cut."""
        made = []
        for number, (source, store) in enumerate(
            zip(self.options.sources, self._stores, strict=True)
        ):
            about = store.about
            made.append(
                SourceReport(
                    path=source.path,
                    weight=source.weight,
                    files=len(about.files),
                    documents=about.documents,
                    tokens=about.tokens,
                    bad=tuple(about.bad),
                    empty=about.empty,
                    without_targets=about.without_targets,
                    cut=self._pieces.cut[number],
                    stretches_left_out=self._pieces.left_out[number],
                    files_left_out=self._found[number].left_out,
                )
            )
        return DataReport(tuple(made))

    def file_of(self, source: int, document: int) -> str:
        """The name of the file that a row's document comes from (`PackedRow.sources`)."""
        return self._stores[source].file_of(document)

    def close(self) -> None:
        """Let go of files and threads."""
        if self._reader is not None:
            self._reader.shutdown()
        for store in self._stores:
            store.close()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def _new_plan(self) -> RowPlan:
        options = self.options
        return RowPlan(
            self._pieces.lengths,
            self._pieces.counts,
            [source.weight for source in options.sources],
            options.tokens_per_row,
            options.seed,
            options.epochs,
        )

    def _step(self, position: Position) -> tuple[list[PackedRow], Position]:
        """This rank's rows of the step at a position, none at the end; the position behind it."""
        rows, behind = self._plan.take(position, self.options.rows)
        if not rows:
            return [], behind
        mine = rows[self._rank :: self._world_size]
        mine += [[]] * (ceil(self.options.rows / self._world_size) - len(mine))
        return [self._pieces.row(pieces) for pieces in mine], behind


@dataclass(frozen=True)
class _State:
    """What `state_dict` gives, beside its version."""

    position: Position
    epochs: float | None
    data: Fingerprint


def _is_partial(epoch: int, epochs: float | None) -> bool:
    return epochs is not None and epoch < epochs < epoch + 1
