"""A model's scores on the documents of sources."""

import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field

from nemotron_v3.data.encode import Encoder
from nemotron_v3.data.options import Source
from nemotron_v3.data.store import TokenStore
from nemotron_v3.evaluation.journal import Journal
from nemotron_v3.evaluation.result import Documents, TextResult
from nemotron_v3.evaluation.share import deal, packs
from nemotron_v3.evaluation.streaming import Scorer
from nemotron_v3.evaluation.tally import Partial, Tally
from nemotron_v3.train.processes import World

KEEP_EVERY = 300.0  # seconds between two copies on disk of a long document's states

Tell = Callable[[str, int, int], None]
"""Told what is done, and how many of how many tokens are behind us."""


class Interrupted(Exception):
    """A signal came, and what was scored is in the journal."""


@dataclass
class Circumstances:
    """What surrounds the work of a process.

    Attributes:
        world: the processes that share the documents.
        journal: where scores are kept before they are whole.
        stopped: says whether the work is to end.
        tell: told of the progress.
    """

    world: World
    journal: Journal
    stopped: Callable[[], bool] = field(default=lambda: False)
    tell: Tell = field(default=lambda _what, _done, _total: None)


def score_source(
    scorer: Scorer, store: TokenStore, key: str, label: str, around: Circumstances
) -> Tally:
    """The scores of all documents of a store, which the processes share.

    Args:
        scorer: of the model.
        store: the documents.
        key: under which the journal keeps them.
        label: what is told of the progress.
        around: processes, journal and progress.

    Raises:
        Interrupted: it was to end; what was scored is in the journal.
    """
    world, journal = around.world, around.journal
    tally = Tally(store.about.documents)
    if world.first:
        journal.read(key, tally)
    lengths = store.lengths.tolist()
    pieces = list(packs(lengths, world.told(tally.left), scorer.window))
    costs = [sum(lengths[document] for document in piece) for piece in pieces]
    mine = deal(costs, world.size)[world.rank]
    work = _Work(scorer, store, key, around)
    done, total = 0, sum(costs[piece] for piece in mine)
    around.tell(label, 0, total)
    interrupted = False
    for number in mine:
        piece = pieces[number]
        before = done
        parts = work.score(piece, lambda count, at=before: around.tell(label, at + count, total))
        if parts is None:
            interrupted = True
            break
        journal.write(key, piece, parts)
        tally.add(piece, parts)
        for document in piece if len(piece) == 1 else ():
            journal.forget(key, document)
        done += costs[number]
        around.tell(label, done, total)
    if any(map(any, world.gather([int(interrupted)]))):
        raise Interrupted
    for tensor in tally.tensors:
        world.sum_(tensor)
    assert bool(tally.done.all()), "every document was dealt to one process"
    return tally


@dataclass
class _Work:
    """The pieces of one process."""

    scorer: Scorer
    store: TokenStore
    key: str
    around: Circumstances

    def score(self, piece: list[int], tell: Callable[[int], None]) -> list[Partial] | None:
        """The scores of documents that belong together; None where the work is to end."""
        if self.around.stopped():
            return None
        lengths = [int(self.store.lengths[document]) for document in piece]
        if len(piece) == 1 and lengths[0] - 1 > self.scorer.window:
            part = self._long(piece[0], lengths[0], tell)
            return None if part is None else [part]
        starts = [int(self.store.starts[document]) for document in piece]
        tokens = [self.store.read(s, n) for s, n in zip(starts, lengths, strict=True)]
        parts = []
        for window in self.scorer.pack(tokens):
            parts.append(Partial())
            parts[-1].add(window)
        return parts

    def _long(self, document: int, length: int, tell: Callable[[int], None]) -> Partial | None:
        """The score of a document that needs several windows."""
        journal, scorer = self.around.journal, self.scorer
        cache = scorer.new_cache(length)
        part = journal.kept(self.key, document, cache)
        start, kept = int(self.store.starts[document]), time.monotonic()

        def read(place: int, count: int):
            return self.store.read(start + place, count)

        while (window := scorer.step(read, length, cache)) is not None:
            part.add(window)
            tell(cache.get_seq_length())
            stopped = self.around.stopped()
            if stopped or time.monotonic() - kept > KEEP_EVERY:
                journal.keep(self.key, document, part, cache)
                kept = time.monotonic()
            if stopped:
                return None
        return part


def text_result(number: int, store: TokenStore, encoder: Encoder, tally: Tally) -> TextResult:
    """The result on the source with this number."""
    about = store.about
    files = [index for index, file in enumerate(about.files) for _ in range(file.documents)]
    tokens, sizes = tally.tokens.tolist(), store.sizes.tolist()
    return TextResult(
        source=number,
        files=[file.name for file in about.files],
        documents=about.documents,
        tokens=sum(tokens),
        bytes=sum(sizes),
        nats=float(tally.nats.sum()),
        first_unscored=0 if encoder.before else _plain(store),
        left_out=about.empty + about.without_targets,
        bad=[str(line) for line in about.bad],
        per_document=Documents(files, tokens, sizes, tally.nats.tolist()),
        per_place=tally.places(),
    )


def _plain(store: TokenStore) -> int:
    """Documents whose first token would count, if something predicted it."""
    return sum(int(store.read(start, 1)) >= 0 for start in store.starts.tolist())


def check_tokens(store: TokenStore, source: Source, vocab_size: int) -> None:
    """Raise `ValueError` for tokens that the model does not have."""
    if store.about.largest >= vocab_size:
        raise ValueError(
            f"{source.path} has token {store.about.largest}, and the model {vocab_size} tokens: "
            "the tokenizer does not belong to it"
        )


def unique_names(paths: Sequence[str]) -> list[str]:
    """The last part of each path, or as many parts as tell them from one another."""
    split = [path.rstrip("/").split("/") for path in paths]
    for count in range(1, max(map(len, split), default=0) + 1):
        names = ["/".join(parts[-count:]) for parts in split]
        if len(set(names)) == len(names):
            return names
    return [f"{path} ({number})" for number, path in enumerate(paths, 1)]
