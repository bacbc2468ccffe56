"""What an evaluation found, as values and as one JSON file.

A file is strict JSON: a number that is not finite, or that nothing was measured for, is null.
"""

import json
import math
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any, Self

from nemotron_v3.config.atomic import atomic_file
from nemotron_v3.config.files import read_object
from nemotron_v3.config.typed import from_object

FORMAT = "nemotron-v3 evaluation"
VERSION = 1
MAX_BYTES = 2**31
PLACES = 48
"""Powers of 2 of places in a document; the last one is far beyond any document."""


@dataclass(frozen=True)
class Documents:
    """The documents of a source, one number each in every list.

    Attributes:
        file: the number of the document's file in the source's `files`.
        tokens: tokens that were scored.
        bytes: of the text in UTF-8 that the scored tokens stand for.
        nats: minus the sum of the scored tokens' log-probabilities.
    """

    file: list[int] = field(default_factory=list)
    tokens: list[int] = field(default_factory=list)
    bytes: list[int] = field(default_factory=list)
    nats: list[float] = field(default_factory=list)

    def __post_init__(self) -> None:
        _check_columns("per_document", self)


@dataclass(frozen=True)
class Places:
    """How well tokens are predicted by their place in the document.

    Attributes:
        starts: entry i counts the tokens at places from `starts[i]` to below `starts[i + 1]`; a
            document's first token has place 0, and is predicted by nothing.
        tokens: tokens that were scored there.
        nats: minus the sum of their log-probabilities.
    """

    starts: list[int] = field(default_factory=list)
    tokens: list[int] = field(default_factory=list)
    nats: list[float] = field(default_factory=list)

    def __post_init__(self) -> None:
        _check_columns("per_place", self)
        rising = all(a < b for a, b in zip([0, *self.starts], self.starts, strict=False))
        if not rising:
            raise ValueError(f"per_place.starts are {self.starts!r:.60}: they rise, from 1 on")


@dataclass(frozen=True)
class TextResult:
    """A checkpoint's score on one source.

    Attributes:
        source: the number of the source in the evaluation's `sources`.
        files: names of the files, below the source's path.
        documents: of them.
        tokens: tokens that were scored; of a document all but the first, of a chat those that
            training learns.
        bytes: of the text in UTF-8 that the scored tokens stand for.
        nats: minus the sum of their log-probabilities.
        first_unscored: documents that begin with a token of their text, which nothing predicts:
            its nats are missing, its bytes are counted.
        left_out: documents without text or targets.
        bad: lines that are no document, each with its place and why.
        per_document: the same by document.
        per_place: the same by place in the document.
    """

    source: int
    files: list[str]
    documents: int
    tokens: int
    bytes: int
    nats: float
    first_unscored: int
    left_out: int
    bad: list[str]
    per_document: Documents
    per_place: Places

    def __post_init__(self) -> None:
        if self.documents != len(self.per_document.tokens):
            raise ValueError(
                f"documents is {self.documents}, and per_document has "
                f"{len(self.per_document.tokens)}"
            )
        for name in ("source", "tokens", "bytes", "first_unscored", "left_out"):
            if getattr(self, name) < 0:
                raise ValueError(f"{name} is {getattr(self, name)}: it is 0 or more")
        if any(not 0 <= number < len(self.files) for number in self.per_document.file):
            raise ValueError(f"per_document.file names files beyond the {len(self.files)} of files")

    @property
    def perplexity(self) -> float:
        """The exponential of the mean of the nats by token."""
        return perplexity(self.nats, self.tokens)

    @property
    def bits_per_token(self) -> float:
        return bits(self.nats, self.tokens)

    @property
    def bits_per_byte(self) -> float:
        return bits(self.nats, self.bytes)

    def to_dict(self) -> dict[str, Any]:
        derived = {n: getattr(self, n) for n in ("perplexity", "bits_per_token", "bits_per_byte")}
        per_document, per_place = asdict(self.per_document), asdict(self.per_place)
        plain = {n: v for n, v in vars(self).items() if not n.startswith("per_")}
        return plain | derived | {"per_document": per_document, "per_place": per_place}


@dataclass(frozen=True)
class TaskMetric:
    """One figure of a task of lm-evaluation-harness.

    Attributes:
        task: its name, of a group too.
        name: of the metric, such as `acc_norm`.
        filter: of the answers, `none` for the answers as they are.
        value: None where it is not finite.
        stderr: its standard error, None where the harness has none.
        higher_is_better: None where the task does not say.
        samples: that were answered; None for a group.
        fewshot: examples before each question, None for a group.
        task_version: of the task's definition, as text.
    """

    task: str
    name: str
    filter: str
    value: float | None
    stderr: float | None
    higher_is_better: bool | None
    samples: int | None
    fewshot: int | None
    task_version: str | None


@dataclass
class CheckpointResult:
    """What one checkpoint gave.

    Attributes:
        name: by which it is shown; no two checkpoints of an evaluation have the same.
        path: its folder.
        adapter: the folder of an adapter that was merged into it, or None.
        dtype: of its weights.
        device: on which it was computed.
        parameters: how many it has.
        parameters_active: how many a token meets.
        seconds: that its texts and tasks took, the loading apart; None where it was interrupted.
        texts: by source.
        tasks: figures of the harness, in its order.
        tokens_computed: tokens that went through the model for the tasks; None without tasks.
        tokens_asked: tokens of the tasks' requests, which it would have taken without sharing.
    """

    name: str
    path: str
    adapter: str | None
    dtype: str
    device: str
    parameters: int
    parameters_active: int
    seconds: float | None = 0.0
    texts: list[TextResult] = field(default_factory=list)
    tasks: list[TaskMetric] = field(default_factory=list)
    tokens_computed: int | None = None
    tokens_asked: int | None = None

    def to_dict(self) -> dict[str, Any]:
        texts, tasks = [t.to_dict() for t in self.texts], [asdict(t) for t in self.tasks]
        return vars(self) | {"texts": texts, "tasks": tasks}

    @classmethod
    def from_dict(cls, told: Any) -> Self:
        """Raises `ValueError` for a value that none can have, with its place."""
        return from_object(cls, told, "checkpoint", null_is_nan=True)


@dataclass
class Evaluation:
    """Several checkpoints on the same sources and tasks.

    Attributes:
        sources: as `nemotron_v3.data.Source` has them: `path`, `format`, `field`, `split`.
        checkpoints: in the order in which they were given.
        started: when, in UTC, such as `2026-11-30T12:00:00Z`.
        options: what else was asked for, by name.
        versions: of this package and those below it, by name.
    """

    sources: list[dict[str, Any]]
    checkpoints: list[CheckpointResult]
    started: str
    options: dict[str, Any]
    versions: dict[str, str]

    def to_dict(self) -> dict[str, Any]:
        checkpoints = [checkpoint.to_dict() for checkpoint in self.checkpoints]
        head = {"format": FORMAT, "version": VERSION}
        return _finite(head | vars(self) | {"checkpoints": checkpoints})

    @classmethod
    def from_dict(cls, told: Mapping[str, Any]) -> Self:
        """Raises `ValueError` for what is no evaluation, or one of another version."""
        if told.get("format") != FORMAT:
            raise ValueError(f"format is {told.get('format')!r}, not {FORMAT!r}")
        if told.get("version") != VERSION:
            raise ValueError(f"version is {told.get('version')!r}: this package reads {VERSION}")
        found = from_object(cls, told, "evaluation", null_is_nan=True)
        if not found.checkpoints:
            raise ValueError("it has no checkpoints")
        count = len(found.sources)
        for checkpoint in found.checkpoints:
            if any(text.source >= count for text in checkpoint.texts):
                raise ValueError(f"{checkpoint.name} has texts of sources beyond the {count} of it")
        return found

    def write(self, path: Path) -> None:
        """Write the file, whole or not at all; raises `OSError`."""
        text = json.dumps(self.to_dict(), allow_nan=False, ensure_ascii=False)
        with atomic_file(path) as temporary:
            temporary.write_text(text + "\n", encoding="utf-8")

    @classmethod
    def read(cls, path: Path) -> Self:
        """Read what `write` wrote; raises `ValueError` and `OSError`."""
        told = read_object(path, MAX_BYTES)
        try:
            return cls.from_dict(told)
        except ValueError as error:
            raise ValueError(f"{path} is no evaluation that can be read: {error}") from None


def perplexity(nats: float, tokens: int) -> float:
    """The exponential of the mean; NaN of nothing, infinite where it has no number."""
    if not tokens:
        return math.nan
    try:
        return math.exp(nats / tokens)
    except OverflowError:
        return math.inf


def bits(nats: float, units: int) -> float:
    """Bits a unit; NaN of nothing."""
    return nats / math.log(2) / units if units else math.nan


def _finite(value: Any) -> Any:
    """`value` with None for each number that JSON cannot write."""
    if isinstance(value, float):
        return value if math.isfinite(value) else None
    if isinstance(value, dict):
        return {name: _finite(each) for name, each in value.items()}
    if isinstance(value, (list, tuple)):
        return [_finite(each) for each in value]
    return value


def _check_columns(name: str, columns: Documents | Places) -> None:
    """Raise `ValueError` for columns of different lengths, or with a count below 0."""
    lengths = {column: len(values) for column, values in vars(columns).items()}
    if len(set(lengths.values())) > 1:
        told = ", ".join(f"{column} {length}" for column, length in lengths.items())
        raise ValueError(f"{name} has columns of different lengths: {told}")
    for column, values in vars(columns).items():
        if column != "nats" and any(value < 0 for value in values):
            raise ValueError(f"{name}.{column} has {min(values)}: a count is 0 or more")
