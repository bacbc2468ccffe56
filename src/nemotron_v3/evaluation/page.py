"""The page of evaluations: checkpoints side by side, by source, by document and by task."""

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from nemotron_v3.evaluation.result import (
    CheckpointResult,
    Evaluation,
    TextResult,
    bits,
    perplexity,
)
from nemotron_v3.pages.chart import Bars, Line, Lines
from nemotron_v3.pages.live import REPORT
from nemotron_v3.pages.page import Block, Page, Tab, Table, check_replaceable, short, write_page

# Documents of a table; a source of more shows those that the checkpoints differ most on.
MOST_DOCUMENTS = 200
MOST_BAD = 20
ABSENT = "-"


@dataclass(frozen=True)
class Scored:
    """A checkpoint's score on one source, with the name by which it is shown."""

    name: str
    text: TextResult


def write_report(paths: Sequence[Path], out: Path | None = None) -> Path:
    """Write one page of all evaluations that are named, and give its path.

    Args:
        paths: their JSON files.
        out: the page. None puts that of one evaluation beside its file, and that of several into
            `report.html` in the working directory.

    Raises:
        ValueError: nothing, or a file that is no evaluation; one at `out` that is no such page.
        OSError: something cannot be read or written.
    """
    if not paths:
        raise ValueError("there is nothing to report: give files of evaluations")
    if out is None:
        out = paths[0].with_suffix(".html") if len(paths) == 1 else Path(REPORT)
    check_replaceable(out)
    write_page(evaluation_page([Evaluation.read(path) for path in paths], paths), out)
    return out


def evaluation_page(evaluations: Sequence[Evaluation], paths: Sequence[Path]) -> Page:
    """What evaluations found, the checkpoints of all of them side by side.

    Args:
        evaluations: at least one.
        paths: of their files, for names.
    """
    checkpoints = _named(evaluations, paths)
    sources = _sources(evaluations, checkpoints)
    title = " / ".join(checkpoints) if len(checkpoints) <= 4 else f"{len(checkpoints)} checkpoints"
    return Page(
        title=title,
        kind="evaluation",
        notices=list(_notices(sources)),
        facts=_facts(checkpoints),
        tabs=[
            Tab("Texts", _texts(sources), "No texts were scored."),
            Tab("Tasks", _tasks(checkpoints), "No tasks of lm-evaluation-harness were run."),
            Tab("Documents", _documents(sources), "No texts were scored."),
            Tab("Checkpoints", _checkpoints(evaluations, checkpoints)),
        ],
    )


def _named(evaluations: Sequence[Evaluation], paths: Sequence[Path]) -> dict[str, CheckpointResult]:
    """The checkpoints by name, with the file's where two files share one."""
    names = [checkpoint.name for each in evaluations for checkpoint in each.checkpoints]
    found: dict[str, CheckpointResult] = {}
    for evaluation, path in zip(evaluations, paths, strict=True):
        for checkpoint in evaluation.checkpoints:
            name = checkpoint.name
            name = f"{name} ({path.stem})" if names.count(name) > 1 else name
            while name in found:
                name += "'"
            found[name] = checkpoint
    return found


def _sources(
    evaluations: Sequence[Evaluation], checkpoints: dict[str, CheckpointResult]
) -> dict[str, list[Scored]]:
    """By source, told by its path and part, who scored it."""
    found: dict[str, list[Scored]] = {}
    names = iter(checkpoints)
    for evaluation in evaluations:
        for checkpoint in evaluation.checkpoints:
            name = next(names)
            for text in checkpoint.texts:
                source = _source_name(evaluation, text.source)
                found.setdefault(source, []).append(Scored(name, text))
    return found


def _source_name(evaluation: Evaluation, number: int) -> str:
    sources = evaluation.sources
    if not 0 <= number < len(sources):
        return f"source {number}"
    told = sources[number]
    path, split = str(told.get("path", f"source {number}")), told.get("split")
    same = [each for each in sources if each.get("path") == told.get("path")]
    return f"{path} ({split})" if len(same) > 1 else path


def _facts(checkpoints: dict[str, CheckpointResult]) -> dict[str, str]:
    texts = [text for each in checkpoints.values() for text in each.texts]
    told = {"checkpoints": str(len(checkpoints))}
    if texts:
        told["documents"] = f"{max(text.documents for text in texts):,}"
        told["bytes"] = f"{max(text.bytes for text in texts):,}"
    tasks = {task.task for each in checkpoints.values() for task in each.tasks}
    if tasks:
        told["tasks"] = str(len(tasks))
    return told


def _notices(sources: dict[str, list[Scored]]) -> Iterator[str]:
    """What a reader has to know before comparing."""
    for source, scored in sources.items():
        if len({s.text.tokens for s in scored}) > 1:
            yield (
                f"{source}: the checkpoints split it into different tokens. Bits a byte compare, "
                "perplexity and bits a token do not."
            )
        for s in scored:
            who = f"{source}, {s.name}"
            if s.text.first_unscored:
                yield (
                    f"{who}: nothing predicts the first token of {_count(s.text.first_unscored)}. "
                    "Its bytes count, its nats do not."
                )
            if s.text.left_out:
                yield f"{who}: {_count(s.text.left_out)} with nothing to score."
            if not math.isfinite(s.text.nats):
                yield f"{who}: the score is not finite."
        bad = scored[0].text.bad
        if bad:
            shown = "; ".join(bad[:MOST_BAD])
            more = f"; and {len(bad) - MOST_BAD:,} more" if len(bad) > MOST_BAD else ""
            yield f"{source}: {len(bad):,} lines are no documents: {shown}{more}."


def _count(documents: int) -> str:
    return "1 document" if documents == 1 else f"{documents:,} documents"


def _texts(sources: dict[str, list[Scored]]) -> list[Block]:
    """Bits a byte of every source and checkpoint; perplexity; and how it falls along a document."""
    if not sources:
        return []
    names = list(dict.fromkeys(s.name for scored in sources.values() for s in scored))
    by_source = {
        source: {s.name: s.text.bits_per_byte for s in scored} for source, scored in sources.items()
    }
    values = {name: [_or_none(found.get(name)) for found in by_source.values()] for name in names}
    blocks: list[Block] = [
        Bars("Bits a byte", "bits a byte", list(sources), values, note="Less is better.")
    ]
    rows = []
    for source, scored in sources.items():
        for s in scored:
            t = s.text
            figures = (t.bits_per_byte, t.bits_per_token, t.perplexity)
            counts = (t.documents, t.tokens, t.bytes)
            rows.append(
                (source, s.name, *(f"{x:.5g}" for x in figures), *(f"{n:,}" for n in counts))
            )
    head = ("source", "checkpoint", "bits a byte", "bits a token", "perplexity")
    head = (*head, "documents", "tokens", "bytes")
    blocks.append(Table(head, rows, numeric=frozenset(range(2, 8))))
    blocks += [_by_place(source, scored) for source, scored in sources.items()]
    return blocks


def _or_none(value: float | None) -> float | None:
    return value if value is not None and math.isfinite(value) else None


def _by_place(source: str, scored: Sequence[Scored]) -> Lines:
    """Bits a token by the token's place in its document."""
    lines = []
    for number, s in enumerate(scored):
        places = s.text.per_place
        found = [
            (start, bits(nats, tokens))
            for start, tokens, nats in zip(places.starts, places.tokens, places.nats, strict=True)
            if tokens
        ]
        starts, values = ([pair[i] for pair in found] for i in (0, 1))
        lines.append(Line(s.name, starts, values, look="points", colour=number))
    note = "A point is the mean of the tokens from its place to the next point's."
    title = f"Bits a token along a document: {source}"
    return Lines(
        title, "bits a token", lines, form=".4f", x="place in the document", log_x=True, note=note
    )


def _documents(sources: dict[str, list[Scored]]) -> list[Block]:
    """Bits a byte of each document, the checkpoints side by side."""
    blocks: list[Block] = []
    for source, scored in sources.items():
        counts = {len(s.text.per_document.tokens) for s in scored}
        groups = [scored] if len(counts) == 1 else [[s] for s in scored]
        for group in groups:
            title = source if len(groups) == 1 else f"{source}: {group[0].name}"
            blocks += _of_documents(title, group)
    return blocks


def _of_documents(title: str, scored: Sequence[Scored]) -> list[Block]:
    """Of checkpoints whose documents are the same."""
    first = scored[0].text.per_document
    figures = [
        [bits(nats, size) for nats, size in zip(d.nats, d.bytes, strict=True)]
        for d in (s.text.per_document for s in scored)
    ]
    numbers = list(range(1, len(first.tokens) + 1))
    if not numbers:
        return []
    lines = [
        Line(s.name, numbers, values, look="points" if len(numbers) < 60 else "line", colour=c)
        for c, (s, values) in enumerate(zip(scored, figures, strict=True))
    ]
    order_told: dict[str, Any] = {
        "x": "document",
        "note": "In the order of the source.",
        "wide": True,
    }
    name = f"Bits a byte by document: {title}"
    chart = Lines(name, "bits a byte", lines, form=".4f", **order_told)
    order, told = _order(figures)
    rows = []
    for i in order:
        document = f"{_file(scored[0].text, i)} #{i + 1}"
        sizes = (f"{first.bytes[i]:,}", f"{first.tokens[i]:,}")
        columns = [s.text.per_document for s in scored]
        perplexities = (short(perplexity(d.nats[i], d.tokens[i])) for d in columns)
        rows.append((document, *sizes, *(f"{x[i]:.4f}" for x in figures), *perplexities))
    head = ("document", "bytes", "tokens", *(f"{s.name}: bits a byte" for s in scored))
    head = (*head, *(f"{s.name}: perplexity" for s in scored))
    table = Table(head, rows, title, frozenset(range(1, len(head))), told)
    return [chart, table] if len(numbers) > 1 else [table]


def _order(figures: Sequence[Sequence[float]]) -> tuple[list[int], str]:
    """The documents of a table: all, or those that tell most."""
    count = len(figures[0])
    if count <= MOST_DOCUMENTS:
        return list(range(count)), ""

    def telling(i: int) -> float:
        values = [each[i] for each in figures]
        if not all(map(math.isfinite, values)):
            return math.inf
        return max(values) - min(values) if len(values) > 1 else values[0]

    ordered = sorted(range(count), key=telling, reverse=True)[:MOST_DOCUMENTS]
    what = (
        "which the checkpoints differ most on" if len(figures) > 1 else "which are predicted worst"
    )
    return ordered, f"{MOST_DOCUMENTS} of {count:,} documents, {what}."


def _file(text: TextResult, document: int) -> str:
    files, numbers = text.files, text.per_document.file
    number = numbers[document] if document < len(numbers) else -1
    return files[number] if 0 <= number < len(files) else "document"


def _tasks(checkpoints: dict[str, CheckpointResult]) -> list[Block]:
    """A table of the harness's figures, and bars of those between 0 and 1."""
    cells: dict[tuple[str, str, str], dict[str, str]] = {}
    values: dict[tuple[str, str, str], dict[str, float]] = {}
    details: dict[tuple[str, str, str], str] = {}
    for name, checkpoint in checkpoints.items():
        for t in checkpoint.tasks:
            key = (t.task, t.name, t.filter)
            error = "" if t.stderr is None else f" ± {t.stderr:.4f}"
            cells.setdefault(key, {})[name] = ABSENT if t.value is None else f"{t.value:.4f}{error}"
            if t.value is not None:
                values.setdefault(key, {})[name] = t.value
            better = {True: "more is better", False: "less is better", None: ""}[t.higher_is_better]
            shots = "" if t.fewshot is None else f"{t.fewshot}-shot"
            samples = "" if t.samples is None else f"{t.samples:,} samples"
            details[key] = ", ".join(filter(None, (better, shots, samples)))
    if not cells:
        return []
    blocks: list[Block] = []
    parts = [key for key, found in values.items() if all(0 <= x <= 1 for x in found.values())]
    if parts:
        bars = {n: [_or_none(values[key].get(n)) for key in parts] for n in checkpoints}
        blocks.append(Bars("Tasks", "", [" ".join(_told(key)) for key in parts], bars, form=".3f"))
    rows = [
        (*_told(key), *(found.get(n, ABSENT) for n in checkpoints), details[key])
        for key, found in cells.items()
    ]
    numeric = frozenset(range(2, 2 + len(checkpoints)))
    blocks.append(Table(("task", "metric", *checkpoints, ""), rows, numeric=numeric))
    return blocks


def _told(key: tuple[str, str, str]) -> tuple[str, str]:
    task, name, answers = key
    return task, name if answers in ("", "none") else f"{name} ({answers})"


def _checkpoints(
    evaluations: Sequence[Evaluation], checkpoints: dict[str, CheckpointResult]
) -> list[Block]:
    """What was evaluated, how, and with which versions."""

    def row(label: str, values: Sequence[object]) -> tuple[str, ...]:
        return (label, *(ABSENT if value is None else str(value) for value in values))

    each = list(checkpoints.values())
    shared = [
        ABSENT
        if not c.tokens_computed or c.tokens_asked is None
        else f"{c.tokens_asked / c.tokens_computed:.2f} times"
        for c in each
    ]
    rows = [
        row("path", [c.path for c in each]),
        row("adapter", [c.adapter for c in each]),
        row("dtype", [c.dtype for c in each]),
        row("device", [c.device for c in each]),
        row("parameters", [f"{c.parameters:,}" for c in each]),
        row("parameters a token", [f"{c.parameters_active:,}" for c in each]),
        row("seconds", [c.seconds if c.seconds is None else f"{c.seconds:,.1f}" for c in each]),
        row("tokens saved by shared prefixes", shared),
    ]
    blocks: list[Block] = [Table(("", *checkpoints), rows)]
    for evaluation in evaluations:
        told = {"started": evaluation.started} | evaluation.options | evaluation.versions
        rows = [row(name, [value]) for name, value in told.items()]
        blocks.append(Table(("", ""), rows, title="Options and versions"))
    return blocks
